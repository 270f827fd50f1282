"""POST /jobs and its aliases, GET /jobs, GET and DELETE /jobs/ID (JOBS).

A request is received and parsed as for /predict (submission.py); then its inputs go into the storage, its row into the
database, and its ID to the broker, by one call in a native thread (calls.py). That call alone takes back what it has
done if a step fails, or if by then nobody waits for it any more.
"""
import re
import threading

import gevent
from flask import Blueprint, Response, current_app, g, jsonify, request

from app.api import access, listing, uploads
from app.api.predict import client, request_deadline
from app.data.background import LISTINGS, Threads
from app.engine.slots import in_native_thread
from app.errors import DeadlineExceeded, ServiceError, invalid_parameter
from app.jobs import openapi, submission
from app.jobs.answers import FINAL
from app.jobs.backlog import Backlog
from app.jobs.calls import Jobs
from app.outbound import addresses

bp = Blueprint("jobs", __name__)

STATES = ("queued", "running", *FINAL)
ID = "[0-9a-f]{32}"
PARTS_PER_FILE = 4  # lists, objects and members of a JSON body, which may be {"b64": …} or {"url": …} with others
POLL_AFTER_S = 1
ENOUGH_S = 10       # if storing and publishing take so long, something is away

ENDPOINTS = {
    "/jobs": "POST what /predict or /predict/batch takes, get the result later; GET lists your jobs",
    "/jobs/ID": "a job's state and result; DELETE cancels it",
    "/predict/async": "the same as POST /jobs",
    "/models/NAME/jobs": "the same with one of several models",
}


def register(app, settings):
    addresses.check_prefixes("CALLBACK_URLS", settings.optional.callback_urls or ())
    listings = app.extensions.setdefault("listings", Threads(LISTINGS))
    jobs = app.extensions["jobs"] = Jobs(app.extensions["database"], settings.optional, listings)
    app.extensions.setdefault("collectors", []).append(Backlog(jobs))
    app.extensions.setdefault("endpoints", {}).update(ENDPOINTS)
    app.extensions.setdefault("documented", []).append(openapi.add)
    app.register_blueprint(bp)


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
            return submission.job_of(option, model, name, settings)

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
        stored, text, is_new = accepted(jobs, row, contents, deadline)
        del contents
    response = answer(stored, text, 202)
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
    found, heard = of_jobs.listing.run(lambda: (of_jobs.listed(
        owner=owner, states=[state for state in states if state], model=model, since=since, until=until, after=after,
        limit=limit + 1), of_jobs.heard()))
    last = found[limit - 1] if len(found) > limit else None
    return jsonify({"status": "success", "jobs": found[:limit], "workers": len(heard),
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
