"""What answers have in common in the OpenAPI document: errors, headers, keys; and short ways to write these."""
EVERYWHERE = ("405", "500")
OF_A_PREDICTION = ("400", "401", "404", "413", "415", "429", "503", "504", *EVERYWHERE)
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
            "The file has 12.3 MB; the limit is 10.5 MB (MAX_FILE_SIZE)."),
    "415": ("This type of content is not accepted.", ["UNSUPPORTED_MEDIA_TYPE"],
            "Content-Type text/plain is not accepted here: send the file as multipart/form-data in the field 'file'."),
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
