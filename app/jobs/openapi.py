"""What the OpenAPI document says of jobs."""
import copy

from app import sizes
from app.api.listing import LATEST_S
from app.api.openapi_answers import EVERYWHERE, SECURITY, errors, header, ref, success
from app.api.openapi_inputs import query

ID = {"name": "job_id", "in": "path", "required": True, "schema": {"type": "string"}, "description": "The job's `id`."}
KEY = {"name": "Idempotency-Key", "in": "header", "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
       "description": "Of your choice, a new one for each job: sent again with the same content, it gets the same job."}
CALLBACK = {"type": "string", "format": "uri", "maxLength": 2048, "pattern": "^https?://[!-~]+$",
            "description": "Where to send the job when it has ended; CALLBACK_URLS decides which URLs are allowed."}
EXAMPLE_ID = "6f0e7a1c55d94c1b8f9a1b0f6c2d3e4a"
UNAVAILABLE = ["Jobs are not available now.", ["JOBS_UNAVAILABLE", "OVERLOADED"],
               "Jobs are not available now; try again later.", "Retry-After"]


def add(document, settings):
    """Add the paths and schemas of jobs to the document."""
    most = settings.optional.max_job_files
    document["tags"].insert(1, {"name": "Jobs"})
    document["components"]["schemas"] |= schemas(document["components"]["schemas"], most)
    document["components"]["headers"] |= {
        "Location": {"description": "The path of the job.", "required": True, "schema": {"type": "string"}},
        "Idempotent-Replayed": {"description": "Sent if this job is that of an earlier request.",
                                "schema": {"const": "true"}},
        "Poll-After": {"description": "Seconds to wait before asking again; not sent once the job has ended.",
                       "schema": {"type": "string", "pattern": "^[0-9]+$"}}}
    paths = job_paths(document["paths"], settings)
    for operations in paths.values():
        for operation in operations.values():
            operation["tags"] = ["Jobs"]
            if settings.api_keys:
                operation["security"] = [{name: []} for name in SECURITY]
    document["paths"] |= paths
    if settings.optional.callback_secret is not None:
        document["webhooks"] = {"jobEnded": {"post": WEBHOOK}}


def job_paths(paths, settings):
    single, batch = paths["/predict"], paths["/predict/batch"]["post"]["requestBody"]["content"]
    has_callbacks = settings.optional.callback_secret is not None
    parameters = [*(one for one in single["post"]["parameters"] if one["name"] != "stream"), KEY, *([{
        "name": "callback_url", "in": "query", "schema": CALLBACK, "description": CALLBACK["description"]}]
        if has_callbacks else [])]
    form = content(single["post"]["requestBody"]["content"], batch, settings.optional.max_job_files, has_callbacks)
    raw = single["put"]["requestBody"]["content"]
    named = next(one for one in paths["/models/{name}/predict"]["post"]["parameters"] if one["name"] == "name")
    submitted = {
        "202": success("Accepted.", ref("Job"), "Location", "Idempotent-Replayed"),
        "422": refusal("The Idempotency-Key came with another request.", ["IDEMPOTENCY_KEY_REUSED"],
                       "This Idempotency-Key came with another request; send a new key with each new job."),
        "503": refusal("There are too many unfinished jobs, or jobs are not available now.",
                       ["JOBS_UNAVAILABLE", "OVERLOADED", "OUT_OF_MEMORY", "MODEL_UNAVAILABLE"], UNAVAILABLE[2],
                       "Retry-After"),
        **errors("400", "401", "404", "413", "415", "429", "504", *EVERYWHERE)}
    with_retry(submitted["202"])

    def submit(name, further=()):
        common = {"parameters": [*further, *parameters], "responses": submitted}
        return {"post": {"summary": "Submit what /predict or /predict/batch takes, and get the result later",
                         "description": f"At most {settings.optional.max_job_files} files, together at most "
                                        f"{sizes.words(settings.optional.max_job_size)}. Several files, or one in "
                                        "`files`, are answered as by /predict/batch.",
                         "operationId": name, **common, "requestBody": {"required": True, "content": form}},
                "put": {"summary": "The same for a raw body", "operationId": f"{name}ByPut", **common,
                        "requestBody": {"required": True, "content": raw}}}
    return {
        "/jobs": {**submit("submitJob"), "get": {
            "summary": "Your jobs, newest first", "operationId": "listJobs", "parameters": LIST_PARAMETERS,
            "responses": {"200": success("A page of them.", ref("Jobs")), "503": refusal(*UNAVAILABLE),
                          **errors("400", "401", "429", *EVERYWHERE)}}},
        "/predict/async": submit("predictAsync"),
        "/models/{name}/jobs": submit("submitJobForModel", [named]),
        "/jobs/{job_id}": {
            "get": {"summary": "A job's state and result", "operationId": "job", "parameters": [ID],
                    "responses": {"200": with_retry(success("The job.", ref("Job"))), "503": refusal(*UNAVAILABLE),
                                  **errors("401", "404", "429", *EVERYWHERE)}},
            "delete": {"summary": "Cancel a job", "operationId": "cancelJob", "parameters": [ID], "responses": {
                "200": success("It is cancelled.", ref("Job")),
                "202": with_retry(success("It is running, and was asked to stop.", ref("Job"))),
                "409": refusal("It has already ended.", ["JOB_FINISHED"],
                               "The job has already succeeded; it can no longer be cancelled."),
                "503": refusal(*UNAVAILABLE), **errors("401", "404", "429", *EVERYWHERE)}}}}


def content(single, batch, most, has_callbacks):
    """{media type: schema} of a body for one input or several."""
    json_url = {"callback_url": {**CALLBACK, "type": ["string", "null"]}} if has_callbacks else {}
    made = copy.deepcopy(single)
    one, several = made["application/json"]["schema"], copy.deepcopy(batch["application/json"]["schema"])
    several["properties"]["instances"]["maxItems"] = most
    several |= {name: schema for name, schema in one["anyOf"][-1].items() if name == "not"}
    one["anyOf"] = [*one["anyOf"][:-1], several]  # the last one is that of instances
    for schema in one["anyOf"]:
        schema["properties"] |= json_url
        schema["properties"].pop("stream", None)
    if "multipart/form-data" in made:
        schema = made["multipart/form-data"]["schema"]
        if "multipart/form-data" in batch:
            files = copy.deepcopy(batch["multipart/form-data"]["schema"]["properties"]["files"])
            schema["properties"]["files"] = {**files, "maxItems": most, "example": []}  # which Swagger UI does not send
            if schema.pop("required", None):
                schema["anyOf"] = [{"required": ["file"]}, {"required": ["files"]}]
    return made


def refusal(description, codes, message, *headers):
    example = {"status": "error", "error": codes[0], "message": message, "request_id": EXAMPLE_ID}
    return {"description": description, "headers": header("X-Request-ID", *headers), "content": {"application/json": {
        "schema": {"allOf": [ref("Error"), {"properties": {"error": {"enum": codes}}}]}, "example": example}}}


def with_retry(response):
    response["headers"]["Retry-After"] = {"$ref": "#/components/headers/Poll-After"}
    return response


STATES = ["queued", "running", "succeeded", "failed", "cancelled"]
TIME = {"anyOf": [{"type": "number", "minimum": -LATEST_S, "maximum": LATEST_S},
                  {"type": "string", "format": "date-time"}]}
LIST_PARAMETERS = [
    {"name": "state", "in": "query", "schema": {"type": "array", "items": {"enum": STATES}}, "style": "form",
     "explode": False, "description": "One or more states, separated by commas."},
    query("model", {"type": "string", "pattern": r"^\w{1,64}$"}, "The name of a model."),
    query("since", TIME, "The earliest time of submission: Unix seconds or ISO 8601."),
    query("until", TIME, "The time before which they were submitted."),
    query("limit", {"type": "integer", "minimum": 1, "maximum": 100}, "How many at most. Default: 20."),
    query("after", {"type": "string", "pattern": "^[A-Za-z0-9_-]*$"},
          "`next` of the page before this one. Jobs that are submitted meanwhile move nothing.")]


def signature(name, schema, description):
    return {"name": name, "in": "header", "required": True, "schema": schema, "description": description}


WEBHOOK = {
    "summary": "What is posted to callback_url when a job has ended", "operationId": "jobEnded", "tags": ["Jobs"],
    "security": [],
    "description": "Any status from 200 to 299 within 10 seconds accepts it; redirects are not followed. 410 ends "
                   "the attempts, Retry-After delays the next one. It may arrive twice, with the same id.",
    "parameters": [
        signature("Webhook-Id", {"type": "string"}, "The message's `id`."),
        signature("Webhook-Timestamp", {"type": "string", "pattern": "^[0-9]+$"}, "When it was sent, in Unix seconds."),
        signature("Webhook-Signature", {"type": "string", "pattern": "^v1,"},
                  "v1, and the base64 of the HMAC-SHA256 with CALLBACK_SECRET of `ID.TIMESTAMP.BODY`, as "
                  "https://www.standardwebhooks.com has it.")],
    "requestBody": {"required": True, "content": {"application/json": {"schema": {
        "type": "object", "required": ["event", "id", "job"], "properties": {
            "event": {"enum": ["job.succeeded", "job.failed", "job.cancelled"]}, "id": {"type": "string"},
            "job": ref("Job")}}}}},
    "responses": {"2XX": {"description": "It is accepted."}}}


def schemas(existing, most):
    text, number = {"type": "string"}, {"type": "number", "minimum": 0}
    number_or_null, some = {"type": ["number", "null"], "minimum": 0}, {"type": "integer", "minimum": 0}

    def record(required, further=None):
        return {"type": "object", "properties": {**required, **(further or {})}, "required": list(required)}
    error = record({"error": text, "message": text})
    attempt = record({"at": number, "status": {"type": ["integer", "null"]}, "error": {"type": ["string", "null"]},
                      "ms": number})
    attempt["properties"]["error"]["description"] = "Why no answer accepted it, if its status does not say so."
    callback = record({"url": text, "id": {"type": ["string", "null"], "description":
                                                   "The message's Webhook-Id; null until the job has ended."},
                       "state": {"enum": ["pending", "delivered", "failed", None],
                                 "description": "null until the job has ended."},
                       "next_at": {**number_or_null, "description": "When the next attempt is due, while pending."},
                       "attempts": {"type": "array", "items": attempt}})
    several = copy.deepcopy(existing["BatchAnswer"])
    several["properties"]["results"]["maxItems"] = most
    none_answered = copy.deepcopy(several)
    none_answered["properties"] |= {"status": {"const": "error"}, "error": {"const": "ALL_FAILED"}, "message": text}
    listed = {
        "status": {"const": "success"}, "id": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
        "state": {"enum": STATES}, "url": text,
        "request_id": {**text, "description": "Of the request that submitted it; logs have it."},
        "model": text, "queue": {"enum": ["short", "long"]},
        "created_at": {**number, "description": "Unix seconds, as all times."}, "started_at": number_or_null,
        "ended_at": number_or_null,
        "expires_at": {**number_or_null, "description": "When it will be removed; null until it has ended."},
        "attempts": {**some, "description": "How often it was begun: again if a worker was lost."},
        "cancel_requested": {"type": "boolean"},
        "progress": record({"done": some, "total": some, "unit": {"enum": ["files", "frames"]}}),
        "callback": {"anyOf": [callback, {"type": "null"}]}, "error": {"anyOf": [error, {"type": "null"}]}}
    result = {"description": "What /predict or /predict/batch would have answered.",
              "anyOf": [{"type": "null"}, ref("Answer"), several, none_answered]}
    further = {"version": {**text, "description": "If the model has several."},
               "warning": {**text, "description": "While it is queued, if no worker is there that could run it."}}
    example = {
        "status": "success", "id": EXAMPLE_ID, "state": "queued", "url": f"/jobs/{EXAMPLE_ID}",
        "request_id": "0f4b3c1e-6d1a-4b5e-9d59-3f2c8a7e6b10", "model": "resnet50",
        "queue": "short", "created_at": 1767225600.5, "started_at": None, "ended_at": None, "expires_at": None,
        "attempts": 0, "cancel_requested": False, "progress": {"done": 0, "total": 1, "unit": "files"},
        "callback": None, "error": None, "result": None}
    return {"Job": {**record({**listed, "result": result}, further), "example": example},
            "ListedJob": record(listed, further),
            "Jobs": record({"status": {"const": "success"}, "jobs": {"type": "array", "items": ref("ListedJob")},
                            "workers": {**some, "description": "How many processes of workers are there."},
                            "next": {"type": ["string", "null"], "description": "`after` of the next page."}})}
