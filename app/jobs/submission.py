"""What a request asks for, as a row of the database and contents of the storage."""
import hashlib
import json
import re
import uuid

from flask import current_app, request

from app import sizes
from app.api import json_body, uploads
from app.errors import ServiceError, invalid_parameter
from app.media.containers import is_video
from app.tasks import options
from app.tasks.from_pictures import FromPictures
from app.tasks.own import Instances

SHORT_FILES = 8         # a job with more is for the queue `long`
MOST_URL = 2048         # characters


def job_of(option, model, name, settings):
    """(the row that Store.add takes, but for who asks, {storage key: bytes}) of the received body. Raises ServiceError
    for what /predict refuses by itself; in a batch, it becomes that file's error."""
    task, optional = model.task, settings.optional
    chosen, url = options.read(option, task), callback_url(option, optional)
    files, is_batch = sent_inputs(task)
    if len(files) > optional.max_job_files:
        raise ServiceError(400, "TOO_MANY_FILES", f"A job may have at most {optional.max_job_files} files, found "
                                                  f"{len(files)}; send the others in a second job.")
    job_id = uuid.uuid4().hex
    inputs, contents, has_video, size = [], {}, False, 0
    for i, file in enumerate(files):
        described = {"filename": file.filename, "field": file.field}
        try:
            kind, data = stored_form(file, settings)
        except ServiceError as e:
            if not is_batch:
                raise
            inputs.append({**described, "error": {"error": e.code, "message": e.message}})
            continue
        contents[f"{job_id}/{i}"] = data
        has_video = has_video or kind == "file" and is_video(data)
        size += len(data)
        inputs.append({"key": f"{job_id}/{i}", **described, "bytes": len(data), "sha256": sha256(data), "kind": kind})
    hashed = {}  # the options, with the hashes of files
    for option_name, value in chosen.items():
        if isinstance(value, bytes):
            contents[f"{job_id}/option-{option_name}"] = value
            size += len(value)
            hashed[option_name] = sha256(value)
            chosen[option_name] = {"key": f"{job_id}/option-{option_name}"}
        else:
            hashed[option_name] = value
    is_long = has_video or len(files) > SHORT_FILES or "audio" in task.takes or bool(task.media_types)
    # The name by which a worker finds it: of several models, one that MODEL_FALLBACK replaces answers to both.
    model_name = model.key.partition("@")[0] if settings.models else model.name
    by_frames = has_video and not is_batch and isinstance(task, FromPictures)
    frames = chosen["frames"] if by_frames and chosen["at"] is None else 1
    same = [name or option("model") or model_name, is_batch, hashed, url,
            [[one["filename"], one.get("sha256"), one.get("kind"), one.get("error")] for one in inputs]]
    return {
        "id": job_id, "queue": "long" if is_long else "short", "model": model_name,
        "version": model.version, "is_batch": is_batch, "options_json": json.dumps(chosen),
        "inputs_json": json.dumps(inputs), "input_bytes": size, "callback_url": url,
        "fingerprint": sha256(json.dumps(same, sort_keys=True).encode()),
        **({"total": frames, "unit": "frames"} if by_frames else {"total": len(files), "unit": "files"})}, contents


def callback_url(option, optional):
    url = option("callback_url")
    if request.is_json:
        json_body.members().pop("callback_url", None)  # it is no part of an input that consists of all members
    if not url:
        return None
    if len(url) > MOST_URL or not re.fullmatch(r"[!-~]+", url):
        raise invalid_parameter("callback_url", f"a URL of at most {MOST_URL} visible ASCII characters",
                                ascii(url[:40]))
    from app.jobs import webhooks  # with the first one
    webhooks.check_callback(url, optional)
    return url


def sent_inputs(task):
    """([Upload], whether one result for each is asked for) of the received body."""
    if task.is_file:
        files = uploads.parse_body(uploads.BATCH_FIELDS, task)
        return files, len(files) > 1 or files[0].field in ("files", "files[]")
    from app.api import values
    instances = json_body.members().get(uploads.INSTANCES) if request.is_json else None
    if isinstance(instances, list) and len(instances) > 1:
        return values.several(task), True
    return [values.one(task, current_app.extensions["settings"])], False


def stored_form(file, settings):
    """(its kind: file, json or instances, bytes for the storage). Raises ServiceError."""
    value = file.read(settings)
    if isinstance(value, bytes):
        return "file", value
    data, most = json.dumps(value).encode(), uploads.one_file_limit(settings)
    if len(data) > most:
        raise ServiceError(413, "FILE_TOO_LARGE", f"The input in {file.field} has {sizes.too_many(len(data), most)}.")
    return "instances" if isinstance(value, Instances) else "json", data


def sha256(data):
    return hashlib.sha256(data).hexdigest()
