"""POST /jobs and its aliases, GET /jobs, GET and DELETE /jobs/ID (JOBS).

A request is received and parsed as for /predict; then its inputs go into the storage, its row into the database, and
its ID to the broker, by one call in a native thread. That call alone takes back what it has done if a step fails, or
if by then nobody waits for it any more.
"""
import hashlib
import json
import re
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import gevent
from flask import Blueprint, Response, current_app, g, jsonify, request

from app.api import access, json_body, listing, uploads
from app.api.predict import client, request_deadline
from app.data.background import LISTINGS, Background, Threads
from app.data.database import had_no_connection, was_too_slow
from app.data.storage import Storage
from app.engine.slots import in_native_thread
from app.errors import DeadlineExceeded, ServiceError, invalid_parameter
from app.jobs import openapi
from app.jobs.answers import FINAL, job_body
from app.jobs.broker import Broker
from app.jobs.store import AWAY, Store, first_line
from app.media.containers import is_video
from app.outbound import addresses
from app.tasks import options
from app.tasks.from_pictures import FromPictures
from app.tasks.own import Instances

bp = Blueprint("jobs", __name__)

STATES = ("queued", "running", *FINAL)
ID = "[0-9a-f]{32}"
SHORT_FILES = 8         # a job with more is for the queue `long`
AT_ONCE = 8             # inputs of a job that are stored at once
MOST_URL = 2048         # characters
PARTS_PER_FILE = 4      # lists, objects and members of a JSON body, which may be {"b64": …} or {"url": …} with others
POLL_AFTER_S = 1
ENOUGH_S = 10           # if storing and publishing take so long, something is away
REMOVALS = 2            # jobs whose inputs are removed at once
REMOVED_WITHIN_S = 60

ENDPOINTS = {
    "/jobs": "POST what /predict or /predict/batch takes, get the result later; GET lists your jobs",
    "/jobs/ID": "a job's state and result; DELETE cancels it",
    "/predict/async": "the same as POST /jobs",
    "/models/NAME/jobs": "the same with one of several models",
}


def register(app, settings):
    addresses.check_prefixes("CALLBACK_URLS", settings.optional.callback_urls or ())
    listings = app.extensions.setdefault("listings", Threads(LISTINGS))
    app.extensions["jobs"] = Jobs(app.extensions["database"], settings.optional, listings)
    app.extensions.setdefault("endpoints", {}).update(ENDPOINTS)
    app.extensions.setdefault("documented", []).append(openapi.add)
    app.register_blueprint(bp)


class Jobs:
    """The way to the storage, the database and the broker. submitting, asking, listing, removing: run blocking calls;
    the long ones, with inputs, the quick ones, lists and the removal of inputs do not wait for each other.

    listings: Threads for lists."""

    def __init__(self, database, optional, listings):
        self.store = Named(Store(database, optional), optional.database_variable)
        self.storage = Named(Storage(optional.storage), "STORAGE_URL" if optional.storage_url else "DATA_DIR")
        self.broker = Named(Broker(optional), "JOBS_BROKER" if optional.jobs_broker else "DATA_DIR")
        message = "Jobs are not available now; try again later."
        self.submitting, self.asking, self.listing, self.removing = (
            Background("JOBS_UNAVAILABLE", message, threads) for threads in (None, None, listings, Threads(REMOVALS)))

    def accept(self, row, contents, left):
        """(the job's row, rows of its webhooks, whether it is new). row: see Store.add; contents: {storage key: bytes};
        left: an Event that is set when nobody waits for this call any more. Raises ServiceError, OSError, and what the
        database raises; then there is no such job, and its inputs are being removed."""
        key = row["idempotency_key"]
        earlier = key and self.store.find_idempotent(row["owner"], key)
        if earlier and self.relies_on(earlier, row):
            return earlier, self.store.deliveries(earlier["id"]), False
        is_kept = False
        try:
            self.store.check(row["owner"], row["input_bytes"])  # which also asks whether the database is there
            self.keep(contents, left)
            check_wanted(left)
            added, is_kept = self.store.add(row)
            if not is_kept:  # another request with this key came first
                if not self.relies_on(added, row):  # and failed
                    raise OSError("a request with the same Idempotency-Key has just failed")
                return added, self.store.deliveries(added["id"]), False
            try:
                check_wanted(left)
                self.broker.publish(row["id"], row["queue"])
            except (OSError, ServiceError):
                is_kept = not self.store.withdraw(row["id"])
                if not is_kept:
                    raise
            return added, [], True  # where it could not be withdrawn, a repeat was told of it: the job will be run
        finally:
            if not is_kept:  # not here: a slow removal does not mean that submitting does not work
                self.submitting.threads.pool.hub.loop.run_callback_threadsafe(self.remove_inputs_soon, row["id"])

    def relies_on(self, earlier, row):
        """Whether the answer can be the job of an earlier request, which then stays. Raises ServiceError if that was
        another one."""
        if earlier["fingerprint"] != row["fingerprint"]:
            raise ServiceError(422, "IDEMPOTENCY_KEY_REUSED", "This Idempotency-Key came with another request; send a "
                                                              "new key with each new job.")
        return self.store.rely_on(earlier["id"])

    def keep(self, contents, left):
        def put(item):
            check_wanted(left)
            self.storage.put(*item)
        if len(contents) < 2:
            for item in contents.items():
                put(item)
            return
        with ThreadPoolExecutor(min(AT_ONCE, len(contents))) as pool:
            for _ in pool.map(put, contents.items()):
                pass

    def found(self, job_id, owner):
        """(the row, the body of the answer as JSON text), or None."""
        row = self.store.get(job_id, owner)
        return row and (row, self.text(row))

    def cancelled(self, job_id, owner):
        """The same, after it was cancelled."""
        row = self.store.cancel(job_id, owner)
        return row and (row, self.text(row))

    def remove_inputs_soon(self, job_id):
        """In a greenlet of its own: whoever cancels a job does not wait for the storage."""
        gevent.spawn(self.remove_inputs, job_id)

    def remove_inputs(self, job_id):
        with suppress(ServiceError):  # what remains is swept up later
            self.removing.run(self.storage.delete_all, job_id, within_s=REMOVED_WITHIN_S)

    def listed(self, **asked):
        """[job object] without results."""
        return [self.body(row) for row in self.store.listed(**asked)]

    def body(self, row):
        has_webhook = row["callback_url"] and row["state"] in FINAL
        return job_body(row, self.store.deliveries(row["id"]) if has_webhook else [])

    def text(self, row):
        return as_json(self.body(row))


class Away(OSError):
    """A part that jobs need is away; the message begins with the variable that says where it is."""


class Named:
    """The store, the storage or the broker, whose methods raise Away for what the outside part raises."""

    def __init__(self, part, variable):
        self.part, self.variable = part, variable

    def __getattr__(self, name):
        found = getattr(self.part, name)
        if not callable(found):
            return found

        def call(*arguments, **named):
            try:
                return found(*arguments, **named)
            except AWAY as e:
                if was_too_slow(e) or had_no_connection(e):  # it is there, but busy
                    raise
                raise Away(f"{self.variable}: {first_line(e)}") from e
        return call


def check_wanted(left):
    if left.is_set():
        raise ServiceError(499, "CLIENT_CLOSED_REQUEST", "Nobody waits for this request any more.")


def as_json(body):
    return json.dumps(body, separators=(",", ":")) + "\n"


# --- submitting ---

@bp.route("/jobs", methods=["POST", "PUT"])
@bp.route("/predict/async", methods=["POST", "PUT"])
@bp.route("/models/<name>/jobs", methods=["POST", "PUT"])
def submit(name=None):
    loader, settings, jobs = (current_app.extensions[name] for name in ("model", "settings", "jobs"))
    optional, deadline, key = settings.optional, request_deadline(settings), idempotency_key()
    request.max_form_parts = 2 * optional.max_job_files + 64
    request.max_json_parts += PARTS_PER_FILE * optional.max_job_files

    def read(option, model):
        with g.stages("read"):
            return job_of(option, model, name, settings)

    def parsed():
        option = in_native_thread(sent_options)
        with loader.lease(name or option("model"), client) as model:
            return in_native_thread(read, option, model)
    with uploads.received(optional.max_job_size, deadline, loader.tasks(name or request.args.get("model"))):
        row, contents = loader.when_loaded(parsed, deadline)
        current_app.extensions["count_batch"](row["total"] if row["is_batch"] else 1)
        row |= {"owner": g.get("client", ""), "request_id": g.request_id, "idempotency_key": key}
        if optional.tracing:
            from app.tracing import spans
            row["trace_json"] = spans.carrier()
        stored, deliveries, is_new = accepted(jobs, row, contents, deadline)
        del contents
    response = answer(stored, in_native_thread(lambda: as_json(job_body(stored, deliveries))), 202)
    response.headers["Location"] = f"/jobs/{stored['id']}"
    if not is_new:
        response.headers["Idempotent-Replayed"] = "true"
    return response


def idempotency_key():
    key = request.headers.get("Idempotency-Key")
    if key is not None and not re.fullmatch(r"[!-~]{1,255}", key):
        raise invalid_parameter("Idempotency-Key", "1 to 255 visible ASCII characters", ascii(key[:40]))
    return key


def sent_options():
    with g.stages("read"):
        return uploads.sent_options()


def accepted(jobs, row, contents, deadline):
    """Jobs.accept, in a native thread, which is told if this greenlet leaves. Raises DeadlineExceeded if the client has
    left little time: that does not mean that the storage is away."""
    left, seconds = threading.Event(), deadline.remaining()
    deadline.check("read")
    timeout = gevent.Timeout(None if seconds > ENOUGH_S else seconds)  # which Background does not take for a failure
    try:
        with g.stages("store"), timeout:
            return jobs.submitting.run(jobs.accept, row, contents, left, within_s=max(seconds, ENOUGH_S))
    except gevent.Timeout as e:
        if e is not timeout:
            raise
        raise DeadlineExceeded("store") from e
    finally:
        left.set()


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
        raise ServiceError(413, "FILE_TOO_LARGE", f"The input in {file.field} has {len(data)} bytes; at most {most} "
                                                  "are allowed.")
    return "instances" if isinstance(value, Instances) else "json", data


def sha256(data):
    return hashlib.sha256(data).hexdigest()


# --- the jobs that there are ---

@bp.get("/jobs/<job_id>")
def job(job_id):
    row, text = asked(current_app.extensions["jobs"].found, job_id)
    return answer(row, text, 200)


@bp.delete("/jobs/<job_id>")
def cancel(job_id):
    jobs = current_app.extensions["jobs"]
    row, text = asked(jobs.cancelled, job_id)
    if row["state"] == "cancelled":
        jobs.remove_inputs_soon(job_id)
    if row["state"] in ("succeeded", "failed"):
        raise ServiceError(409, "JOB_FINISHED", f"The job has already {row['state']}; it can no longer be cancelled.")
    return answer(row, text, 202 if row["state"] == "running" else 200)


@bp.get("/jobs")
def jobs():
    listing.only("state", "model", "since", "until", "limit", "after")
    owner, since, until, after = access.whose(), listing.moment("since"), listing.moment("until"), listing.after(ID)
    states = (listing.text("state") or "").split(",")
    for state in filter(None, states):
        if state not in STATES:
            raise invalid_parameter("state", "one or more of " + ", ".join(STATES), ascii(state[:40]))
    model = listing.text("model")
    if model and not re.fullmatch(r"\w{1,64}", model):
        raise invalid_parameter("model", "a model's name, without its version", ascii(model[:40]))
    limit, of_jobs = listing.limit(100, 20), current_app.extensions["jobs"]
    found = of_jobs.listing.run(lambda: of_jobs.listed(
        owner=owner, states=[state for state in states if state], model=model, since=since, until=until, after=after,
        limit=limit + 1))
    last = found[limit - 1] if len(found) > limit else None
    return jsonify({"status": "success", "jobs": found[:limit],
                    "next": last and listing.cursor(last["created_at"], last["id"])})


def asked(call, job_id):
    if not re.fullmatch(ID, job_id):
        raise no_such_job()
    found = current_app.extensions["jobs"].asking.run(call, job_id, access.whose())
    if found is None:
        raise no_such_job()
    return found


def no_such_job():
    return ServiceError(404, "NOT_FOUND", "There is no such job; it may have expired.")


def answer(row, text, status):
    response = Response(text, status, content_type="application/json")
    if row["state"] not in FINAL:
        response.headers["Retry-After"] = str(POLL_AFTER_S)
    return response
