"""What the OpenAPI document says of the history."""
from app.api.openapi_answers import EVERYWHERE, SECURITY, errors, header, ref, success
from app.api.openapi_inputs import query
from app.history.api import AWAY, COLUMNS, MOST

TEXT, NUMBER, SOME = {"type": "string"}, {"type": "number"}, {"type": "integer", "minimum": 0}
OR_NULL, SHA256 = {"type": ["string", "null"]}, {"type": "string", "pattern": "^[0-9a-f]{64}$"}
TIME = {"anyOf": [{"type": "number", "minimum": 0, "maximum": 1e10}, {"type": "string", "format": "date-time"}]}
REQUEST_ID = "0f4b3c1e-6d1a-4b5e-9d59-3f2c8a7e6b10"


def add(document, settings):
    """Add the paths and schemas of the history to the document."""
    document["tags"].insert(1, {"name": "History"})
    document["components"]["schemas"] |= {"History": HISTORY, "PastPrediction": PREDICTION}
    document["components"]["headers"]["Link"] = {
        "description": "The path of the next page, with rel=\"next\"; not sent with the last one.", "schema": TEXT}
    request_id = {"name": "request_id", "in": "path", "required": True,
                  "schema": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,128}$"}, "description": "A request's ID."}
    paths = {
        "/history": {"get": operation("The predictions that were made, newest first", "history", parameters(100))},
        "/history/{request_id}": {"get": operation("The predictions of one request", "historyOfRequest",
                                                   [request_id, *parameters(MOST)], "404")}}
    for operations in paths.values():
        operations["get"]["tags"] = ["History"]
        if settings.api_keys:
            operations["get"]["security"] = [{name: []} for name in SECURITY]
    document["paths"] |= paths


def operation(summary, name, parameters, *statuses):
    found = success("A page of them.", ref("History"), "Link")
    found["content"]["text/csv"] = {"schema": TEXT, "example": ",".join(COLUMNS)}
    away = {"description": "The database cannot be reached now, or is busy.",
            "headers": header("X-Request-ID", "Retry-After"),
            "content": {"application/json": {
                "schema": {"allOf": [ref("Error"), {"properties": {
                    "error": {"enum": ["HISTORY_UNAVAILABLE", "OVERLOADED"]}}}]},
                "example": {"status": "error", "error": "HISTORY_UNAVAILABLE", "message": AWAY,
                            "request_id": REQUEST_ID}}}}
    return {"summary": summary, "operationId": name, "parameters": parameters, "responses": {
        "200": found, "503": away, **errors("400", "401", "429", *statuses, *EVERYWHERE)}}


def parameters(limit):
    return [query(*one) for one in (
        ("model", TEXT, "A model's name, or a name and a version, such as cats@2."),
        ("class", TEXT, "The best class of a classifier's answer."),
        ("since", TIME, "From this time on: Unix seconds, or ISO 8601."),
        ("until", TIME, "Before this time."),
        ("min_confidence", NUMBER, "The least confidence in the best class."),
        ("max_confidence", NUMBER, "The greatest confidence in the best class."),
        ("limit", {"type": "integer", "minimum": 1, "maximum": MOST}, f"How many there may be. Default: {limit}."),
        ("after", {**TEXT, "pattern": "^[A-Za-z0-9_-]*$"}, "The `next` of the page before."),
        ("format", {"enum": ["json", "csv"]}, "Instead of the header Accept."))]


PREDICTION = {"type": "object", "required": list(COLUMNS), "properties": {
    "time": {**NUMBER, "description": "When it was answered, in Unix seconds."},
    "request_id": TEXT,
    "position": {**SOME, "description": "Of the file in its batch, from 0."},
    "model": TEXT,
    "version": OR_NULL,
    "weights": {**OR_NULL, "description": "Their SHA-256; null for a model of one's own."},
    "input_sha256": {**SHA256, "description": "Of the file, of the text in UTF-8, or of the JSON with sorted members "
                                              "and without white space."},
    "class": {**OR_NULL, "description": "The best one of a classifier."},
    "confidence": {"type": ["number", "null"]},
    "milliseconds": {**NUMBER, "description": "Of all stages together."},
    "cached": {"type": "boolean", "description": "Whether the answer came from the cache."},
    "options": {"type": "object", "description": "With the defaults; of files the SHA-256."},
    "predictions": {"description": "As answered; null if longer than 4 KiB."},
    "owner": {"type": "string", "description": "With a key of ADMIN_KEYS: the SHA-256 of the key that asked."}}}

HISTORY = {"type": "object", "required": ["status", "history", "next"], "properties": {
    "status": {"const": "success"}, "history": {"type": "array", "maxItems": MOST, "items": ref("PastPrediction")},
    "next": {**OR_NULL, "description": "For the parameter `after`; null on the last page."}}}
