"""What the OpenAPI document says of V2."""
from app.api.openapi_answers import SECURITY, header, success
from app.api.openapi_inputs import PNG_BASE64
from app.open_inference.request_body import MOST_ID
from app.open_inference.tensors import LARGEST, SIZES

TEXT, TEXTS, OBJECT = {"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "object"}
SHAPE = {"type": "array", "items": {"type": "integer", "minimum": -1}}
TENSOR = {"type": "object", "required": ["name", "datatype", "shape"], "properties": {
    "name": TEXT, "datatype": {"enum": list(SIZES)}, "shape": SHAPE}}
WITH_DATA = {**TENSOR, "properties": {**TENSOR["properties"], "parameters": OBJECT, "data": {
    "type": "array", "description": "Flat, or nested in this shape. Of BYTES texts: files are in base64. FP32: numbers "
                                    f"within ±{LARGEST:,.0f}."}}}
OUTPUT = {"type": "object", "required": ["name"], "properties": {"name": TEXT, "parameters": {
    "type": "object", "properties": {
        "binary_data": {"type": "boolean"},
        "classification": {"type": "integer", "minimum": 0,
                           "description": "That many classes as texts value:index:label, instead of the values."}}}}}
REQUEST = {"type": "object", "required": ["inputs"], "properties": {
    "id": {**TEXT, "maxLength": MOST_ID, "description": "The answer has the same."},
    "parameters": {**OBJECT, "description": "Options of the model, such as top_k; binary_data_output."},
    "inputs": {"type": "array", "minItems": 1, "maxItems": 1, "items": WITH_DATA},
    "outputs": {"type": "array", "items": OUTPUT}}}
OF_PICTURES = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [PNG_BASE64]}]}
RESPONSE = {"type": "object", "required": ["model_name", "outputs"], "properties": {
    "model_name": TEXT, "model_version": TEXT, "id": TEXT, "outputs": {"type": "array", "items": WITH_DATA}}}
READY = {"type": "object", "required": ["ready"], "properties": {"name": TEXT, "ready": {"type": "boolean"}}}
ERROR = {"type": "object", "required": ["error"], "properties": {"error": TEXT}}
MODEL = {"type": "object", "required": ["name", "platform", "inputs", "outputs"], "properties": {
    "name": TEXT, "versions": TEXTS, "platform": TEXT, "inputs": {"type": "array", "items": TENSOR},
    "outputs": {"type": "array", "items": TENSOR}}}
INDEX = {"type": "array", "items": {"type": "object", "required": ["name", "state", "reason"], "properties": {
    "name": TEXT, "version": TEXT, "state": {"enum": ["READY", "UNAVAILABLE"]}, "reason": TEXT}}}

FAILURES = {"400": "The request cannot be used.", "401": "API_KEYS is set, and the request carries no valid key.",
            "404": "No such model.", "405": "This path does not allow this method.", "413": "Too large.",
            "415": "The body is compressed.",
            "422": "With method=face, no face was found.", "429": "More predictions than RATE_LIMIT allows.",
            "500": "A bug in the service.", "503": "Temporarily unavailable.", "504": "Not answered in time."}
FURTHER = {"401": ["WWW-Authenticate"], "405": ["Allow"], "429": ["Retry-After"]}


def add(document, settings):
    """Add V2's paths to the document."""
    document["tags"].insert(1, {"name": "Open Inference Protocol"})
    of_predict = document["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"].get("example")
    example = {"example": OF_PICTURES} if of_predict == {"image": PNG_BASE64} else {}
    named = [{"name": name, "in": "path", "required": True, "schema": TEXT} for name in ("name", "version")]
    paths = {"/v2": {"get": operation("Name, version and extensions", "v2", {
        "type": "object", "required": ["name", "version", "extensions"],
        "properties": {"name": TEXT, "version": TEXT, "extensions": TEXTS}}, settings)},
        "/v2/health/live": {"get": operation("Whether the process answers", "v2Live", {
            "type": "object", "required": ["live"], "properties": {"live": {"type": "boolean"}}}, None)},
        "/v2/health/ready": {"get": operation("Whether requests can be answered", "v2Ready", READY, None, "503")},
        "/v2/repository/index": {
            "get": operation("The models", "v2Index", INDEX, settings),
            "post": {**operation("The models", "v2IndexPost", INDEX, settings, "400", "413"), "requestBody": {
                "content": {"application/json": {"schema": {"type": "object", "properties": {
                    "ready": {"type": "boolean", "description": "Only those that are ready."}}}}}}}}}
    for prefix, parameters, of in (("/v2/models/{name}", named[:1], ""),
                                   ("/v2/models/{name}/versions/{version}", named, "OfVersion")):
        paths[prefix] = {"get": operation("A model's inputs and outputs", f"v2Model{of}", MODEL, settings, "404")}
        paths[f"{prefix}/ready"] = {"get": operation("Whether a model is ready", f"v2ModelReady{of}", READY, settings,
                                                     "404", "503")}
        infer = operation("Inputs in, outputs out", f"v2Infer{of}", RESPONSE, settings, "400", "404", "413", "415",
                          "422", "429", "503", "504")
        binary = {"schema": {"type": "string", "format": "binary"}}
        infer["responses"]["200"]["content"]["application/octet-stream"] = binary
        infer |= {"description": "Bodies and answers may have binary tensors after the JSON: "
                                 "Inference-Header-Content-Length says where they begin.",
                  "requestBody": {"required": True, "content": {
                      "application/json": {"schema": REQUEST, **example},
                      "application/octet-stream": binary}}}
        paths[f"{prefix}/infer"] = {"post": infer}
        for path in (prefix, f"{prefix}/ready", f"{prefix}/infer"):
            paths[path] = {method: {**one, "parameters": parameters} for method, one in paths[path].items()}
    document["paths"] |= paths


def operation(summary, name, schema, settings, *statuses):
    """settings: None if no key is needed."""
    needs_key = settings is not None and bool(settings.api_keys)
    found = {"summary": summary, "operationId": name, "tags": ["Open Inference Protocol"], "responses": {
        "200": success(summary, schema),
        **{status: failure(status) for status in (*statuses, *["401", "429"] * needs_key, "405", "500")}}}
    return {**found, "security": [{name: []} for name in SECURITY]} if needs_key else found


def failure(status):
    """An error of V2; of health, 503 has no Retry-After."""
    return {"description": FAILURES[status], "headers": header("X-Request-ID", *FURTHER.get(status, [])),
            "content": {"application/json": {"schema": ERROR, "example": {"error": FAILURES[status]}}}}
