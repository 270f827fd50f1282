"""The service's OpenAPI 3.1 document.

Swagger UI sends a parameter's default, and an example for each field of a form, as if the user had typed them. So
defaults are said in words, and forms have only inputs: the options are in the query, which goes with every body.
"""
import json

from app.api.uploads import FILE_FIELDS, batch_limit
from app.config import FACE_METHODS, NAME, VERSION
from app.tasks.from_pictures import FromPictures
from app.tasks.options import STREAM

# A red square of 8 × 8 pixels, small enough for an example.
PNG_BASE64 = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEklEQVR4nGP8z4AdMOEQH6QSAM1BAQ/oQeJvAAAAAElFTkSuQmCC"


def document(settings, tasks, parts=()):
    """The OpenAPI 3.1 document for these settings and the tasks that answer, as JSON types. parts: functions of the
    optional parts, called with the document and the settings, which add what is theirs."""
    made = {
        "openapi": "3.1.0",
        "info": {"title": NAME, "version": VERSION, "summary": "Models behind HTTP.",
                 "description": "Send an input in any common form and get the model's answer. "
                                "Options go in the query, in fields of a form, or in members of a JSON object; "
                                "the body wins, and a repeated option is refused. Options that only other models have "
                                "are ignored.\n\nAll errors have the same form: a stable code in `error`, and what to "
                                "change in `message`."},
        "servers": [{"url": "/"}],
        "tags": [{"name": "Predict"}, {"name": "Status"}, {"name": "Documentation"}],
        "paths": tagged(paths(settings, tasks), settings),
        "components": {"schemas": schemas(settings, tasks), "headers": HEADERS,
                       **({"securitySchemes": SECURITY} if settings.api_keys else {}),
                       "responses": {status: error_response(status, settings) for status in ERRORS}}}
    for add in parts:
        add(made, settings)
    return made


def options(tasks):
    """{name: (what it does, its schema)} of a prediction's options that are no files, and of those that are."""
    plain, files = {}, {}
    for task in tasks:
        for option in task.options:
            meaning = with_default(option.meaning, None if option.is_file else option.default_of(task.settings))
            (files if option.is_file else plain).setdefault(option.name, (meaning, documented(option.schema)))
    return plain, files


def documented(schema):
    """The schema of an option; of what is true or false, without the other words for it."""
    return {"type": "boolean"} if schema == STREAM.schema else schema


def with_default(meaning, default):
    if default in (None, ""):
        return meaning
    return f"{meaning} Default: {default if isinstance(default, str) else json.dumps(default)}.".lstrip()


def or_null(schema):
    """The same schema, but null is valid too: JSON may hold it for an option that is not sent."""
    wider = {"enum": [*schema["enum"], None]} if "enum" in schema else {}
    types = schema.get("type", [])
    return {**schema, **wider, **({"type": [*([types] if isinstance(types, str) else types), "null"]} if types else {})}


MEDIA = {"type": "object", "required": ["media_type", "b64"], "properties": {
    "media_type": {"type": "string"}, "b64": {"type": "string", "contentEncoding": "base64"}}}

ERRORS = {
    "400": ("The request or the file cannot be used.",
            ["MISSING_FILE", "MISSING_INPUT", "EMPTY_FILE", "INVALID_IMAGE", "INVALID_VIDEO", "INVALID_AUDIO",
             "INVALID_PARAMETER", "INVALID_JSON", "TOO_MANY_FILES", "URL_NOT_ALLOWED", "BAD_REQUEST"],
            "top_k must be an integer from 1 to 10, got 20"),
    "401": ("API_KEYS is set, and the request carries no valid key.", ["UNAUTHORIZED"],
            "This needs a valid key: send one as 'Authorization: Bearer KEY' or in the header X-API-Key."),
    "404": ("There is nothing at this path, or no such model.", ["NOT_FOUND"],
            "There is nothing at this path; GET / lists the endpoints."),
    "405": ("This path does not allow this method.", ["METHOD_NOT_ALLOWED"],
            "This path takes POST, not GET."),
    "413": ("Too large, in bytes, pixels or seconds.",
            ["FILE_TOO_LARGE", "IMAGE_TOO_LARGE", "VIDEO_TOO_LARGE", "VIDEO_TOO_LONG"],
            "The file has 20971520 bytes; at most 10485760 are allowed."),
    "415": ("This type of content is not accepted.", ["UNSUPPORTED_MEDIA_TYPE"],
            "Content-Type text/plain is not accepted here: send one as multipart/form-data in the field 'file'."),
    "422": ("With method=face, no face was found; or the server behind an input's URL did not send it.",
            ["NO_FACE_FOUND", "INPUT_NOT_FETCHED"],
            "No face was found; send a picture with a face that looks at the camera, or method=face+middle or middle."),
    "429": ("More predictions than RATE_LIMIT allows, or too many requests without a valid key.", ["RATE_LIMITED"],
            "Too many predictions: 60 per 1 minute are allowed, and each file of a batch counts; try again later."),
    "500": ("A bug in the service.", ["INTERNAL_ERROR"],
            "The service failed; its log has the reason under the request ID."),
    "503": ("Temporarily unavailable.", ["OVERLOADED", "OUT_OF_MEMORY", "MODEL_UNAVAILABLE", "SHUTTING_DOWN"],
            "The service is at its limit; try again later."),
    "504": ("Not answered in time.", ["DEADLINE_EXCEEDED"],
            "The time allowed for this request ran out (during queue)."),
}
EVENT = {  # of a stream: before OpenAPI 3.2, its schema is that of each event
    "type": "object", "required": ["event", "data"], "properties": {
        "event": {"enum": ["frame", "error", "end"], "description":
                  "With stream=true: `frame` for each frame of a video, as in metadata.frames, or for each file, as in "
                  "a batch's results; `error` for a file, with its index, or for the request; `end` with the whole "
                  "answer for a video, else with count and failed."},
        "data": {"type": "string", "contentMediaType": "application/json"}}}
EVERYWHERE = ("405", "500")
OF_A_PREDICTION = ("400", "401", "404", "413", "415", "429", "503", "504", *EVERYWHERE)
KEY_NEEDED = ("/predict", "/predict/batch", "/models", "/models/{name}/predict",
              "/models/{name}/predict/batch", "/info", "/metrics")

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


def get(summary, schema, example=None, further=None, description=None, parameters=()):
    operation = {"summary": summary, **({"parameters": list(parameters)} if parameters else {}),
                 "responses": {"200": success(summary, schema, example=example), **(further or {}),
                                                   **errors(*EVERYWHERE)}}
    return {"get": operation if description is None else {**operation, "description": description}}


def tagged(paths, settings):
    for path, operations in paths.items():
        tag = "Predict" if "/predict" in path else "Documentation" if path in DOCUMENTATION else "Status"
        for operation in operations.values():
            operation["tags"] = [tag]
            if path in KEY_NEEDED and settings.api_keys:
                operation["security"] = [{name: []} for name in SECURITY]
    return paths


DOCUMENTATION = ("/", "/openapi.json", "/docs")


def inputs(settings, tasks):
    """({media type: its schema} of a request for one prediction, the same of a batch, of PUT)."""
    plain, files = options(tasks)
    parts = {name: {**schema, "description": meaning} for name, (meaning, schema) in files.items()}
    members = {name: or_null({**schema, "description": meaning}) for name, (meaning, schema) in (plain | files).items()}
    members["model"] = or_null({"type": "string"})
    raw = {"schema": {"type": "string", "format": "binary"}}
    form, json_body, raws, several = {}, [], {}, []
    examples = []
    for task in tasks:
        if task.is_file:
            form["file"] = {"type": "string", "format": "binary", "description": f"The {' or '.join(task.takes)}. The "
                            f"names {', '.join(FILE_FIELDS[1:])} are accepted too."}
            raws |= {"application/octet-stream": raw, **{f"{'image' if kind == 'picture' else kind}/*": raw
                                                         for kind in task.takes}}
            json_body.append(("image", ref("Base64")))
            several.append(ref("Instance"))
            if settings.optional and settings.optional.input_urls:
                json_body.append(("url", ref("URL")))
                several.append({"type": "object", "required": ["url"], "properties": {"url": ref("URL")},
                                "additionalProperties": False})
            if "picture" in task.takes:
                examples.append({"image": PNG_BASE64})
        else:
            schema = {"type": "string", "minLength": 1} if "text" in task.takes else task.input_schema
            if "text" in task.takes:
                form[task.field] = schema
                raws["text/plain"] = {"schema": schema}
            json_body.append((task.field, schema))
            several.append(schema)
            if task.example is not None:
                examples.append({task.field: task.example} if task.field else task.example)
    most = 1 if all(task.is_file for task in tasks) else settings.max_batch_files
    one_of = [{"type": "object", "properties": {name: schema, **members}, "required": [name],
               "additionalProperties": False} if name else {"type": "object", "properties": members}
              for name, schema in json_body]
    instances = {"type": "object", "required": ["instances"], "additionalProperties": False, "properties": {
        "instances": {"type": "array", "description": "As in TensorFlow Serving.", "minItems": 1, "maxItems": most,
                      "items": {"anyOf": several} if len(several) > 1 else several[0]}, **members}}
    example = {"example": examples[0]} if examples else {}
    content = {"application/json": {"schema": {"anyOf": [*one_of, instances]}, **example}}
    batch = {"application/json": {"schema": {**instances, "properties": {
        **instances["properties"], "instances": {**instances["properties"]["instances"],
                                                 "maxItems": settings.max_batch_files}}}}}
    if form:
        required = {"required": list(form)} if len(tasks) == 1 else {}
        form = {"schema": {"type": "object", "properties": {**form, **parts}, **required}}
        content = {"multipart/form-data": form, **content}  # the first one is what Swagger UI offers
    if any(task.is_file for task in tasks):
        files = {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1,
                 "maxItems": settings.max_batch_files}
        batch = {"multipart/form-data": {"schema": {"type": "object", "required": ["files"],
                                                    "properties": {"files": files, **parts}}}, **batch}
        batch["application/json"]["example"] = {"instances": [{"b64": PNG_BASE64}, {"b64": "bm8gcGljdHVyZQ=="}]}
    for schema in content["application/json"]["schema"]["anyOf"]:
        schema["properties"]["stream"] = or_null({"type": "boolean", "description": STREAM.meaning})
    return {**content, **raws}, batch, raws


def query(name, schema, description):
    return {"name": name, "in": "query", "schema": schema, "description": description}


def paths(settings, tasks):
    which = [query("model", {"type": "string"}, "Which model answers: a name, or a name and a version, such as cats@2.")
             ] * bool(settings.models)
    parameters = [
        *(query(name, schema, description) for name, (description, schema) in options(tasks)[0].items()), *which,
        {"name": "X-Request-Timeout", "in": "header", "schema": {"type": "number", "minimum": 0.001},
         "description": "Seconds after which you no longer want the answer, if fewer than "
                        f"{settings.request_timeout:g}."}]
    of_one = [*parameters, query("stream", {"type": "boolean"}, with_default(STREAM.meaning, STREAM.default))]
    content, batch, raws = inputs(settings, tasks)
    media = {media_type: {"schema": {"type": "string", "format": "binary"}} for task in tasks
             for media_type in task.media_types}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"},
            "description": "A name, or a name and a version, such as cats@2."}
    answered = {"200": success("The prediction.", ref("Answer"), "Server-Timing", "X-Cache"),
                **errors(*OF_A_PREDICTION, "422")}
    answered["200"]["content"] |= {**media, "text/event-stream": {"schema": EVENT}}
    health = {"503": success("Not ready: loading, draining, or the self-test failed.", ref("Health"))}
    return {
        "/": {"get": {
            "summary": "The service's endpoints; for a browser, a page to try it",
            "responses": {"200": {"description": "The endpoints, or the page.", "headers": header("X-Request-ID"),
                                  "content": {"application/json": {"schema": ref("Index")},
                                              "text/html": {"schema": {"type": "string"}}}},
                          **errors(*EVERYWHERE)}}},
        "/predict": {
            "post": {"summary": "One input in, one prediction out", "operationId": "predict",
                     "parameters": of_one, "requestBody": {"required": True, "content": content},
                     "responses": answered},
            "put": {"summary": "The same for a raw body: curl -T photo.jpg", "operationId": "predictByPut",
                    "parameters": of_one, "requestBody": {"required": True, "content": raws or content},
                    "responses": answered}},
        "/predict/batch": {"post": (in_batches := {
            "summary": "Several inputs in, one result for each, in order", "operationId": "predictBatch",
            "description": f"At most {settings.max_batch_files} inputs, together at most "
                           f"{batch_limit(settings)} bytes. A bad one does not affect the others.",
            "parameters": parameters, "requestBody": {"required": True, "content": batch},
            "responses": {"200": success("At least one input was answered.", ref("BatchAnswer"), "Server-Timing",
                                         "X-Cache"),
                          "422": success("None was answered: ALL_FAILED.", ref("BatchError"), "Server-Timing"),
                          **errors(*OF_A_PREDICTION)}})},
        "/models": get("The models", ref("Models"), further=errors("401", "429")),
        "/models/{name}/predict": {
            "post": {"summary": "A prediction of one of several models", "operationId": "predictWithModel",
                     "parameters": [name, *of_one], "requestBody": {"required": True, "content": content},
                     "responses": answered},
            "put": {"summary": "The same for a raw body", "operationId": "predictWithModelByPut",
                    "parameters": [name, *of_one], "requestBody": {"required": True, "content": raws or content},
                    "responses": answered}},
        "/models/{name}/predict/batch": {"post": {**in_batches, "operationId": "predictBatchWithModel",
                                                  "parameters": [name, *parameters]}},
        "/health": get("Readiness, for load balancers", ref("Health"), further=health,
                       description="200 when a prediction would be answered, else 503 with `reason`."),
        "/ready": get("The same as /health", ref("Health"), further=health),
        "/live": get("Liveness: 200 as long as the process answers", ref("Live"),
                     {"status": "alive", "version": VERSION, "timestamp": 1767225600.5}),
        "/info": get("A model, the limits and the versions", ref("Info"), further=errors("401", "404", "429"),
                     parameters=which),
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


def schemas(settings, tasks):
    def record(required, further=None, **description):
        return {"type": "object", "properties": {**required, **(further or {})}, "required": list(required),
                **description}

    text, number, milliseconds = {"type": "string"}, {"type": "number"}, {"type": "number", "minimum": 0}
    wording = {"description": "What to change, as a sentence.", "type": "string", "minLength": 1}
    some = {"type": "integer", "minimum": 0}
    answers = [schema for task in tasks for schema in (
        task.answer_kind().schema(), *([MEDIA] if task.media_types else []))]
    answers = [schema for i, schema in enumerate(answers) if schema not in answers[:i]]
    if not all(task.is_file for task in tasks):
        answers = [{"anyOf": [*answers, {"type": "array", "description": "Of a request with instances."}]}]
    predictions = answers[0] if len(answers) == 1 else {"anyOf": answers}
    traits = {"type": "object", "additionalProperties": number}
    of_pictures = ["media_type", "image_size"] if all(isinstance(task, FromPictures) for task in tasks) else []
    explanations = {"type": "array", "items": ref("Explanation"), "minItems": 1, "description":
                    "With explain=true: where the model looked, for one class or for each trait. Of a video, each "
                    "frame that counts has its own."}
    shot = record({"index": {**some, "description": "Number of the frame in display order, from 0."},
                   "time_s": milliseconds},
                  {"predictions": {**predictions, "description": "For this frame; missing if it does not count."},
                   "face_detected": {"type": "boolean"}, "explanations": explanations,
                   "face_box": {"type": ["array", "null"], "items": some, "minItems": 4, "maxItems": 4,
                                "description": "[x, y, width, height] of the crop, in pixels; null for no crop."}})
    metadata = record({
        "model": text, "device": text,
        "inference_time": {**milliseconds, "description": "Seconds in the model; 0 for an answer from the cache."},
        "timings_ms": {"type": "object", "additionalProperties": milliseconds,
                       "description": "Milliseconds in each stage."}},
        {"version": {**text, "description": "If the model has several."},
         "media_type": {"enum": ["image", "video"]},
         "image_size": {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 2, "maxItems": 2,
                        "description": "[width, height] of the picture when upright."},
         "filename": {"type": ["string", "null"], "description": "The base name; null if none was sent."},
         "frames": {"type": "array", "items": shot, "minItems": 1,
                    "description": "The frames analysed: for videos with any model, for pictures with ocean."},
         "backbone": text, "method": {"enum": list(FACE_METHODS)}, "tta": {"type": "boolean"},
         "face_detected": {"type": "boolean", "description": "Whether every frame that counts was cropped to a face."},
         "spread": {**traits, "description": "Standard deviation over frames and mirror images."},
         "uncertainty": {**record({"entropy": {**milliseconds, "description": "In nats: 0 for certainty."},
                                   "margin": {**milliseconds, "maximum": 1}}), "description":
                         "How sure a classifier is: the entropy of all its probabilities, and by how much the best "
                         "one exceeds the next."},
         "explanations": explanations,
         "embedding": {"type": "array", "items": number, "minItems": 1, "description":
                       "With embedding=true: the vector before the network's last layer, averaged over frames and "
                       "mirror images."}})
    metadata["required"] += of_pictures
    prediction = {"predictions": predictions, "metadata": ref("Metadata")}
    success_word, error_word = {"const": "success"}, {"const": "error"}
    position = {"index": some, "filename": {"type": ["string", "null"]}}
    results = {"count": {**some, "minimum": 1}, "failed": some,
               "results": {"type": "array", "items": ref("BatchResult"), "minItems": 1,
                           "maxItems": settings.max_batch_files}}
    return {
        "Base64": {"type": "string", "minLength": 4, "contentEncoding": "base64", "format": "base64-picture",
                   "description": "A picture or video in base64, or as a base64 data: URL."},
        "URL": {"type": "string", "format": "uri",
                "description": "Where to fetch the input: a URL that INPUT_URLS allows."},
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
        "Explanation": record(
            {"map": {"type": "array", "minItems": 1, "items": {"type": "array", "items": milliseconds, "minItems": 1},
                     "description": "Rows of cells: how much each adds to the class's logit, or the trait's score, "
                                    "and 0 where it takes away. The class activation map, as Grad-CAM scales it."},
             "overlay": {**text, "contentEncoding": "base64", "contentMediaType": "image/png", "description":
                         "A picture to lay over the upright input: the stronger, the less transparent."}},
            {"class": text, "class_id": some, "trait": text}),
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
        "Models": record({"status": success_word, "models": {"type": "array", "minItems": 1,
                                                             "items": ref("ModelState")}}),
        "ModelState": record({"name": text, "default": {"type": "boolean"}, "loaded": {"type": "boolean"}}, {
            "version": text, "memory_bytes": some,
            "share": {**number, "description": "Percentage of the requests for this name without a version."},
            "shadow": {"type": "boolean", "description": "Whether it answers too, unseen."}}),
        "Info": record({
            "status": success_word,
            "model": record({"name": text, "task": text, "device": text, "engine": text,
                             "takes": {"type": "array", "items": text}, "options": {"type": "array", "items": {
                                 "type": "object"}}},
                            {"precision": text, "input_size": {"type": "array", "items": some},
                             "preprocessing": record({"resize": some, "crop": some, "interpolation": text,
                                                      "mean": {"type": "array", "items": number},
                                                      "std": {"type": "array", "items": number}}),
                             "weights": record({"source": text, "sha256": text}),
                             "calibration": {"type": ["object", "null"]},
                             "features": record({"kind": {"enum": ["maps", "vector", None]}, "size": some,
                                                 "reason": {"type": ["string", "null"]}})}),
            "config": {"type": "object"},
            "versions": {"type": "object", "additionalProperties": text}}),
    }
