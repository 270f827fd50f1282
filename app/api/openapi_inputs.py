"""The OpenAPI document's bodies of requests, and the options in them and in the query."""
import json

from app.api.openapi_answers import ref
from app.api.stream import LIVE
from app.api.uploads import FILE_FIELDS
from app.tasks.options import STREAM

# A red square of 8 × 8 pixels, small enough for an example.
PNG_BASE64 = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEklEQVR4nGP8z4AdMOEQH6QSAM1BAQ/oQeJvAAAAAElFTkSuQmCC"


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


def add_live(paths):
    """Add the bodies that are answered while they arrive to the paths that take them."""
    schema = {"type": "string", "format": "binary", "description":
              "JPEGs one after the other, as cameras send them, answered as they arrive. Only with stream=true."}
    for path in ("/predict", "/models/{name}/predict"):
        for operation in paths[path].values():
            body = operation["requestBody"]
            operation["requestBody"] = {**body, "content": body["content"] | dict.fromkeys(LIVE, {"schema": schema})}


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
