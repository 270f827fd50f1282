"""The service's OpenAPI 3.1 document."""
from app.api.uploads import FILE_FIELDS, batch_limit
from app.config import FACE_METHODS, NAME, VERSION
from app.tasks.options import ALL

# A red square of 8 × 8 pixels, small enough for an example.
PNG_BASE64 = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEklEQVR4nGP8z4AdMOEQH6QSAM1BAQ/oQeJvAAAAAElFTkSuQmCC"


def document(settings, task):
    """The OpenAPI 3.1 document for these settings and a task's kind, as JSON types."""
    return {
        "openapi": "3.1.0",
        "info": {"title": NAME, "version": VERSION, "summary": "One vision model behind HTTP.",
                 "description": "Send a picture or a video in any common form and get what the model sees in it. "
                                "Options go in the body or in the query; the body wins, and a repeated option is "
                                "refused. Options that the model does not use are ignored.\n\nAll errors have the same "
                                "form: a stable code in `error`, and what to change in `message`."},
        "servers": [{"url": "/"}],
        "tags": [{"name": "Predict"}, {"name": "Status"}, {"name": "Documentation"}],
        "paths": tagged(paths(settings), settings),
        "components": {"schemas": schemas(settings, task), "headers": HEADERS,
                       "securitySchemes": SECURITY,
                       "responses": {status: error_response(status, settings) for status in ERRORS}}}


def options(settings):
    """{name: (what it does, its schema)} of a prediction's options."""
    return {option.name: (option.meaning, option.schema | ({"default": option.default(settings)} if option.setting
                                                           else {})) for option in ALL}


def or_null(schema):
    """The same schema, but null is valid too: JSON may hold it for an option that is not sent."""
    wider = {"enum": [*schema["enum"], None]} if "enum" in schema else {}
    return {**schema, **wider, **({"type": [schema["type"], "null"]} if "type" in schema else {})}


ERRORS = {
    "400": ("The request or the file cannot be used.",
            ["MISSING_FILE", "EMPTY_FILE", "INVALID_IMAGE", "INVALID_VIDEO", "INVALID_PARAMETER", "INVALID_JSON",
             "TOO_MANY_FILES", "BAD_REQUEST"], "top_k must be an integer from 1 to 10, got 20"),
    "401": ("API_KEYS is set, and the request carries no valid key.", ["UNAUTHORIZED"],
            "This needs a valid key: send one as 'Authorization: Bearer KEY' or in the header X-API-Key."),
    "404": ("There is nothing at this path.", ["NOT_FOUND"],
            "There is nothing at this path; GET / lists the endpoints."),
    "405": ("This path does not allow this method.", ["METHOD_NOT_ALLOWED"],
            "This path does not allow this method; the Allow header lists those it does."),
    "413": ("Too large, in bytes, pixels or seconds.",
            ["FILE_TOO_LARGE", "IMAGE_TOO_LARGE", "VIDEO_TOO_LARGE", "VIDEO_TOO_LONG"],
            "The file has 20971520 bytes; at most 10485760 are allowed."),
    "415": ("This type of content is not accepted.", ["UNSUPPORTED_MEDIA_TYPE"],
            "Content-Type text/plain is not accepted here: send one as multipart/form-data in the field 'file'."),
    "422": ("With method=face, no face was found.", ["NO_FACE_FOUND"],
            "No face was found; send a picture with a face that looks at the camera, or method=face+middle or middle."),
    "429": ("More predictions than RATE_LIMIT allows, or too many requests without a valid key.", ["RATE_LIMITED"],
            "Too many predictions: 60 per 1 minute are allowed, and each file of a batch counts; try again later."),
    "500": ("A bug in the service.", ["INTERNAL_ERROR"],
            "The service failed; its log has the reason under the request ID."),
    "503": ("Temporarily unavailable.", ["OVERLOADED", "OUT_OF_MEMORY", "SHUTTING_DOWN"],
            "The service is at its limit; try again later."),
    "504": ("Not answered in time.", ["DEADLINE_EXCEEDED"],
            "The time allowed for this request ran out (during queue)."),
}
EVERYWHERE = ("405", "500")
OF_A_PREDICTION = ("400", "401", "413", "415", "429", "503", "504", *EVERYWHERE)
KEY_NEEDED = ("/predict", "/predict/batch", "/info", "/metrics")

HEADERS = {
    "X-Request-ID": {"description": "The request's ID, which is in its log lines: yours, if you sent one of 1 to "
                                    "128 characters A-Z, a-z, 0-9, '.', '_' and '-', else a new one.",
                     "required": True, "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"}},
    "Server-Timing": {"description": "Milliseconds spent in each stage.",
                      "schema": {"type": "string"}, "example": "read;dur=0.4, queue;dur=0.01, inference;dur=36.9"},
    "X-Cache": {"description": "With a result cache: whether the answer came from it.",
                "schema": {"enum": ["hit", "miss"]}},
    "Retry-After": {"description": "Seconds to wait before trying again.", "required": True,
                    "schema": {"type": "string", "pattern": "^[0-9]+$"}},
    "Allow": {"description": "The methods that this path allows.", "required": True, "schema": {"type": "string"}},
    "WWW-Authenticate": {"description": "How to send a key.", "required": True, "schema": {"const": "Bearer"}},
}


SECURITY = {"bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"}}


def header(*names):
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def ref(name):
    return {"$ref": f"#/components/schemas/{name}"}


def error_response(status, settings):
    description, codes, message = ERRORS[status]
    further = {"401": ["WWW-Authenticate"], "405": ["Allow"], "429": ["Retry-After"],
               "503": ["Retry-After"]}.get(status, [])
    schema = {"allOf": [ref("Error"), {"properties": {"error": {"enum": codes}}}]}
    example = {"status": "error", "error": codes[0], "message": message,
               "request_id": "0f4b3c1e-6d1a-4b5e-9d59-3f2c8a7e6b10"}
    if status == "400":
        example["error"] = "INVALID_PARAMETER"
    return {"description": description, "headers": header("X-Request-ID", *further),
            "content": {"application/json": {"schema": schema, "example": example}}}


def success(description, schema, *headers, example=None):
    content = {"schema": schema} if example is None else {"schema": schema, "example": example}
    return {"description": description, "headers": header("X-Request-ID", *headers),
            "content": {"application/json": content}}


def errors(*statuses):
    return {status: {"$ref": f"#/components/responses/{status}"} for status in statuses}


def get(summary, schema, example=None, further=None, description=None):
    operation = {"summary": summary, "responses": {"200": success(summary, schema, example=example), **(further or {}),
                                                   **errors(*EVERYWHERE)}}
    return {"get": operation if description is None else {**operation, "description": description}}


def tagged(paths, settings):
    for path, operations in paths.items():
        tag = "Predict" if path.startswith("/predict") else "Documentation" if path in DOCUMENTATION else "Status"
        for operation in operations.values():
            operation["tags"] = [tag]
            if path in KEY_NEEDED and settings.api_keys:
                operation["security"] = [{name: []} for name in SECURITY]
    return paths


DOCUMENTATION = ("/", "/openapi.json", "/docs")


def paths(settings):
    parameters = [{"name": name, "in": "query", "description": description, "schema": schema, "allowEmptyValue": True}
                  for name, (description, schema) in options(settings).items()]
    parameters.append({"name": "X-Request-Timeout", "in": "header", "schema": {"type": "number", "minimum": 0.001},
                       "description": "Seconds after which you no longer want the answer, if fewer than "
                                      f"{settings.request_timeout:g}."})
    fields = {name: {**schema, "description": description} for name, (description, schema) in options(settings).items()}
    members = {name: or_null(schema) for name, schema in fields.items()}
    raw = {"schema": {"type": "string", "format": "binary"}}
    raws = {"image/*": raw, "video/*": raw, "application/octet-stream": raw}
    one_file = {"multipart/form-data": {"schema": {
        "type": "object", "properties": {"file": {
            "type": "string", "format": "binary",
            "description": f"The picture or video. The names {', '.join(FILE_FIELDS[1:])} are accepted too."},
            **fields},
        "required": ["file"]}}}
    as_json = {"application/json": {
        "schema": {"anyOf": [
            {"type": "object", "properties": {"image": ref("Base64"), **members}, "required": ["image"],
             "not": {"required": ["instances"]}},
            {"type": "object", "required": ["instances"], "not": {"required": ["image"]}, "properties": {
                "instances": {"type": "array", "items": ref("Instance"), "minItems": 1, "maxItems": 1}, **members}}]},
        "examples": {"base64": {"value": {"image": PNG_BASE64, "top_k": 3}},
                     "data: URL": {"value": {"image": f"data:image/png;base64,{PNG_BASE64}"}},
                     "TensorFlow Serving": {"value": {"instances": [{"b64": PNG_BASE64}]}}}}}
    answered = {"200": success("The prediction.", ref("Answer"), "Server-Timing", "X-Cache"),
                **errors(*OF_A_PREDICTION, "422")}
    health = {"503": success("Not ready: loading, draining, or the self-test failed.", ref("Health"))}
    return {
        "/": {"get": {
            "summary": "The service's endpoints; for a browser, a page to try it",
            "responses": {"200": {"description": "The endpoints, or the page.", "headers": header("X-Request-ID"),
                                  "content": {"application/json": {"schema": ref("Index")},
                                              "text/html": {"schema": {"type": "string"}}}},
                          **errors(*EVERYWHERE)}}},
        "/predict": {
            "post": {"summary": "One picture or video in, one prediction out", "operationId": "predict",
                     "parameters": parameters,
                     "requestBody": {"required": True, "content": {**one_file, **raws, **as_json}},
                     "responses": answered},
            "put": {"summary": "The same for a raw body: curl -T photo.jpg", "operationId": "predictByPut",
                    "parameters": parameters, "requestBody": {"required": True, "content": raws},
                    "responses": answered}},
        "/predict/batch": {"post": {
            "summary": "Several pictures or videos in, one result per file, in order", "operationId": "predictBatch",
            "description": f"At most {settings.max_batch_files} files, together at most "
                           f"{batch_limit(settings)} bytes. A bad file does not affect the others.",
            "parameters": parameters,
            "requestBody": {"required": True, "content": {
                "multipart/form-data": {
                    "schema": {"type": "object", "required": ["files"], "properties": {
                        "files": {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1,
                                  "maxItems": settings.max_batch_files}, **fields}}},
                "application/json": {
                    "schema": {"type": "object", "required": ["instances"], "properties": {
                        "instances": {"type": "array", "items": ref("Instance"), "minItems": 1,
                                      "maxItems": settings.max_batch_files}, **members}},
                    "example": {"instances": [{"b64": PNG_BASE64}, {"b64": "bm8gcGljdHVyZQ=="}], "top_k": 1}}}},
            "responses": {"200": success("At least one file was answered.", ref("BatchAnswer"), "Server-Timing",
                                         "X-Cache"),
                          "422": success("No file was answered: ALL_FAILED.", ref("BatchError"), "Server-Timing"),
                          **errors(*OF_A_PREDICTION)}}},
        "/health": get("Readiness, for load balancers", ref("Health"), further=health,
                       description="200 when a prediction would be answered, else 503 with `reason`."),
        "/ready": get("The same as /health", ref("Health"), further=health),
        "/live": get("Liveness: 200 as long as the process answers", ref("Live"),
                     {"status": "alive", "version": VERSION, "timestamp": 1767225600.5}),
        "/info": get("The model, the limits and the versions", ref("Info"), further=errors("401", "429")),
        "/metrics": {"get": {
            "summary": "Counts and times of all workers, for Prometheus",
            "responses": {"200": {"description": "Prometheus' text format, or OpenMetrics if that is preferred.",
                                  "headers": header("X-Request-ID"),
                                  "content": {"text/plain": {"schema": {"type": "string"}},
                                              "application/openmetrics-text": {"schema": {"type": "string"}}}},
                          **errors("401", "429", *EVERYWHERE)}}},
        "/openapi.json": get("This document", {"type": "object"}),
        "/docs": {"get": {"summary": "This document, to read and try", "responses": {
            "200": {"description": "The page.", "headers": header("X-Request-ID"),
                    "content": {"text/html": {"schema": {"type": "string"}}}}, **errors(*EVERYWHERE)}}},
    }


def schemas(settings, task):
    def record(required, further=None, **description):
        return {"type": "object", "properties": {**required, **(further or {})}, "required": list(required),
                **description}

    text, number, milliseconds = {"type": "string"}, {"type": "number"}, {"type": "number", "minimum": 0}
    wording = {"description": "What to change, as a sentence.", "type": "string", "minLength": 1}
    some = {"type": "integer", "minimum": 0}
    classes = {"type": "array", "description": "Highest first.", "minItems": 1, "maxItems": 10, "items": record({
        "class": text, "class_id": some,
        "confidence": {"type": "number", "minimum": 0, "maximum": 1, "description": "Softmax probability."}})}
    traits = {"type": "object", "additionalProperties": number,
              "description": "The regression's raw score of each trait, about 0 to 1."}
    predictions = classes if task == "classification" else traits
    shot = record({"index": {**some, "description": "Number of the frame in display order, from 0."},
                   "time_s": milliseconds},
                  {"predictions": {**predictions, "description": "For this frame; missing if it does not count."},
                   "face_detected": {"type": "boolean"},
                   "face_box": {"type": ["array", "null"], "items": some, "minItems": 4, "maxItems": 4,
                                "description": "[x, y, width, height] of the crop, in pixels; null for no crop."}})
    metadata = record({
        "media_type": {"enum": ["image", "video"]}, "model": text, "device": text,
        "image_size": {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 2, "maxItems": 2,
                       "description": "[width, height] of the picture when upright."},
        "inference_time": {**milliseconds, "description": "Seconds in the model; 0 for an answer from the cache."},
        "timings_ms": {"type": "object", "additionalProperties": milliseconds,
                       "description": "Milliseconds in each stage."}},
        {"filename": {"type": ["string", "null"], "description": "The base name; null if none was sent."},
         "frames": {"type": "array", "items": shot, "minItems": 1,
                    "description": "The frames analysed: for videos with any model, for pictures with ocean."},
         "backbone": text, "method": {"enum": list(FACE_METHODS)}, "tta": {"type": "boolean"},
         "face_detected": {"type": "boolean", "description": "Whether every frame that counts was cropped to a face."},
         "spread": {**traits, "description": "Standard deviation over frames and mirror images."}})
    prediction = {"predictions": predictions, "metadata": ref("Metadata")}
    success_word, error_word = {"const": "success"}, {"const": "error"}
    position = {"index": some, "filename": {"type": ["string", "null"]}}
    results = {"count": {**some, "minimum": 1}, "failed": some,
               "results": {"type": "array", "items": ref("BatchResult"), "minItems": 1,
                           "maxItems": settings.max_batch_files}}
    return {
        "Base64": {"type": "string", "minLength": 4, "contentEncoding": "base64", "format": "base64-picture",
                   "description": "A picture or video in base64, or as a base64 data: URL."},
        "Instance": {"anyOf": [record({"b64": ref("Base64")}, additionalProperties=False), ref("Base64")]},
        "Error": record({"status": error_word, "error": {"type": "string", "pattern": "^[A-Z_]+$"}, "message": wording,
                         "request_id": text}),
        "Answer": record({"status": success_word, **prediction}, example={
            "status": "success",
            "predictions": [{"class": "golden retriever", "confidence": 0.8532, "class_id": 207}],
            "metadata": {"filename": "dog.jpg", "media_type": "image", "model": "resnet50", "device": "cpu",
                         "image_size": [1024, 768], "inference_time": 0.037,
                         "timings_ms": {"read": 1.2, "queue": 0.4, "decode": 4.8,
                                        "preprocess": 3.1, "inference": 36.9}}}),
        "Metadata": metadata,
        "BatchResult": {"oneOf": [record({**position, "status": success_word, **prediction}),
                                  record({**position, "status": error_word, "error": text, "message": wording})]},
        "BatchAnswer": record({"status": success_word, **results}),
        "BatchError": record({"status": error_word, "error": {"const": "ALL_FAILED"}, "message": wording,
                              "request_id": text, **results}),
        "Health": record({"status": {"enum": ["healthy", "unhealthy"]}, "model": text, "device": text,
                          "model_loaded": {"type": "boolean"}, "uptime_seconds": milliseconds, "version": text,
                          "timestamp": {**number, "description": "Unix seconds."}},
                         {"reason": {"enum": ["loading", "draining", "self_test_failed"]},
                          "fallback_for": {**text, "description": "The configured model, if MODEL_FALLBACK is served "
                                                                  "in its place."}}),
        "Live": record({"status": {"const": "alive"}, "version": text, "timestamp": number}),
        "Index": record({"name": text, "version": text, "status": {"const": "running"},
                         "endpoints": {"type": "object", "additionalProperties": text}}),
        "Info": record({
            "status": success_word,
            "model": record({"name": text, "task": text, "device": text, "engine": text, "precision": text,
                             "input_size": {"type": "array", "items": some},
                             "preprocessing": record({"resize": some, "crop": some, "interpolation": text,
                                                      "mean": {"type": "array", "items": number},
                                                      "std": {"type": "array", "items": number}}),
                             "weights": record({"source": text, "sha256": text})}),
            "config": {"type": "object"},
            "versions": {"type": "object", "additionalProperties": text}}),
    }
