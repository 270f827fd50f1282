"""The service's OpenAPI 3.1 document.

Swagger UI sends a parameter's default, and an example for each field of a form, as if the user had typed them. So
defaults are said in words, and forms have only inputs: the options are in the query, which goes with every body.
"""
from app import sizes
from app.api.openapi_answers import (
    ERRORS,
    EVERYWHERE,
    HEADERS,
    OF_A_PREDICTION,
    SECURITY,
    error_response,
    errors,
    header,
    ref,
    success,
)
from app.api.openapi_inputs import add_live, inputs, options, query, with_default
from app.api.openapi_schemas import schemas
from app.api.uploads import batch_limit
from app.config import NAME, VERSION
from app.tasks.options import STREAM


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
    if any("picture" in task.takes for task in tasks):
        add_live(made["paths"])
    return made


EVENT = {  # of a stream: before OpenAPI 3.2, its schema is that of each event
    "type": "object", "required": ["event", "data"], "properties": {
        "event": {"enum": ["frame", "error", "end"], "description":
                  "With stream=true: `frame` for each frame of a video, as in metadata.frames, or for each file, as in "
                  "a batch's results; `error` for a file, with its index, or for the request; `end` with the whole "
                  "answer for a video, else with count and failed."},
        "data": {"type": "string", "contentMediaType": "application/json"}}}
KEY_NEEDED = ("/predict", "/predict/batch", "/models", "/models/{name}/predict",
              "/models/{name}/predict/batch", "/info", "/metrics")


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
    put = {"required": True, "content": raws or content}
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
                    "parameters": of_one, "requestBody": put, "responses": answered}},
        "/predict/batch": {"post": (in_batches := {
            "summary": "Several inputs in, one result for each, in order", "operationId": "predictBatch",
            "description": f"At most {settings.max_batch_files} inputs, together at most "
                           f"{sizes.words(batch_limit(settings))}. A bad one does not affect the others.",
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
                    "parameters": [name, *of_one], "requestBody": put, "responses": answered}},
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
