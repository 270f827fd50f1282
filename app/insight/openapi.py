"""What the OpenAPI document says of /embed."""
from app.api.openapi_answers import OF_A_PREDICTION, SECURITY, errors, ref, success

OTHERS = ("top_k", "explain", "explain_class", "embedding", "stream")  # options of /predict
TEXT, SOME = {"type": "string"}, {"type": "integer", "minimum": 0}
OPTIONS = ("method", "tta", "use_tta", "frames", "at", "normalize", "model", "X-Request-Timeout")


def add(document, settings):
    """Add the paths and schemas of embeddings to the document, if pictures are what the models take."""
    paths = document["paths"]
    one, several = (paths[path]["post"]["requestBody"]["content"] for path in ("/predict", "/predict/batch"))
    if "multipart/form-data" not in several:
        return
    raws = {media_type: content for media_type, content in one.items()
            if media_type not in ("application/json", "multipart/form-data")}
    schemas = [*one["application/json"]["schema"]["anyOf"][:-1], several["application/json"]["schema"]]
    content = without_others({
        **several, "application/json": {**several["application/json"], "schema": {"anyOf": schemas}}, **raws})
    parameters = [parameter for parameter in paths["/predict"]["post"]["parameters"] if parameter["name"] in OPTIONS]
    name = paths["/models/{name}/predict"]["post"]["parameters"][0]
    document["components"]["schemas"] |= {"Embeddings": embeddings(settings), "Embedding": EMBEDDING,
                                          "EmbeddingsError": error(settings)}
    for path, suffix, further in (("/embed", "", []), ("/models/{name}/embed", "WithModel", [name])):
        paths[path] = {
            "post": operation("The embeddings of pictures: the vector before the model's last layer", f"embed{suffix}",
                              [*further, *parameters], content, settings),
            "put": operation("The same for a raw body: curl -T photo.jpg", f"embed{suffix}ByPut",
                             [*further, *parameters], raws or content, settings)}


def without_others(schema):
    """The same schema without the options that embeddings do not have."""
    if isinstance(schema, list):
        return [without_others(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {name: without_others({key: one for key, one in value.items() if key not in OTHERS}
                                 if name == "properties" else value) for name, value in schema.items()}


def operation(summary, name, parameters, content, settings):
    return {"summary": summary, "operationId": name, "tags": ["Predict"], "parameters": parameters,
            "description": f"Takes 1 to {settings.max_batch_files} files in any form that /predict or /predict/batch "
                           "takes. 400 INVALID_PARAMETER if the model has no such vector.",
            "requestBody": {"required": True, "content": content},
            "responses": {"200": success("At least one file was answered.", ref("Embeddings"), "Server-Timing"),
                          "422": success("None was answered: ALL_FAILED.", ref("EmbeddingsError"), "Server-Timing"),
                          **errors(*OF_A_PREDICTION)},
            **({"security": [{scheme: []} for scheme in SECURITY]} if settings.api_keys else {})}


POSITION = {"index": SOME, "filename": {"type": ["string", "null"]}}
EMBEDDING = {"oneOf": [
    {"type": "object", "required": ["index", "filename", "status", "embedding"], "properties": {
        **POSITION, "status": {"const": "success"},
        "embedding": {"type": "array", "items": {"type": "number"}, "minItems": 1,
                      "description": "Averaged over the frames of a video and the mirror images of ocean."}}},
    {"type": "object", "required": ["index", "filename", "status", "error", "message"], "properties": {
        **POSITION, "status": {"const": "error"}, "error": TEXT, "message": TEXT}}]}


def counts(settings):
    return {"count": {**SOME, "minimum": 1}, "failed": SOME,
            "results": {"type": "array", "items": ref("Embedding"), "minItems": 1,
                        "maxItems": settings.max_batch_files}}


def embeddings(settings):
    return {"type": "object", "required": ["status", "model", "size", "normalized", "count", "failed", "results"],
            "properties": {"status": {"const": "success"}, "model": TEXT, "version": TEXT,
                           "size": {**SOME, "minimum": 1, "description": "Of each embedding."},
                           "normalized": {"type": "boolean", "description": "Whether each has length 1."},
                           **counts(settings)}}


def error(settings):
    return {"type": "object", "required": ["status", "error", "message", "request_id", "count", "failed", "results"],
            "properties": {"status": {"const": "error"}, "error": {"const": "ALL_FAILED"}, "message": TEXT,
                           "request_id": TEXT, **counts(settings)}}
