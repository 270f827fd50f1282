"""GET /history and /history/REQUEST_ID: who asked what, and what was answered (HISTORY)."""
import csv
import datetime
import io
import json
import re
import urllib.parse

from flask import Blueprint, Response, current_app, g, request
from sqlalchemy import select, tuple_
from sqlalchemy.exc import OperationalError

from app.api import access, listing
from app.data.background import LISTINGS, Background, Threads
from app.data.database import was_too_slow
from app.data.schema import history
from app.errors import ServiceError, invalid_parameter
from app.history.recorder import Recorder
from app.server.logs import REQUEST_ID

bp = Blueprint("history", __name__)

MOST = 1000
COLUMNS = ("time", "request_id", "position", "model", "version", "weights", "input_sha256", "class", "confidence",
           "milliseconds", "cached", "options", "predictions")
FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # the wide ones mean the same in some
AWAY = "The history cannot be read now; try again later."

ENDPOINTS = {"/history": "GET the predictions that were made, newest first, as JSON or CSV",
             "/history/REQUEST_ID": "GET those of one request"}


def register(app, settings):
    recorder = Recorder(app.extensions["database"], settings.optional)
    recorder.start()

    def record(model, data, options, answer, cached, position=0):
        recorder.record(model, data, options, answer, cached, position, g.request_id, g.get("client", ""))

    def document(made, settings):
        from app.history import openapi  # only needed there
        openapi.add(made, settings)
    app.extensions["record"], app.extensions["at_exit"] = record, recorder.stop
    listings = app.extensions.setdefault("listings", Threads(LISTINGS))
    app.extensions["history"] = History(app.extensions["database"], listings)
    app.extensions.setdefault("endpoints", {}).update(ENDPOINTS)
    app.extensions.setdefault("documented", []).append(document)
    app.register_blueprint(bp)


@bp.get("/history")
def newest():
    return page([], 100)[0]


@bp.get("/history/<request_id>")
def of_request(request_id):
    if REQUEST_ID.fullmatch(request_id):
        response, count = page([history.c.request_id == request_id], MOST)
        if count:
            return response
    raise ServiceError(404, "NOT_FOUND", "There is no prediction with this request ID, or it is another key's.")


def page(where, most):
    """(Response, number) of the predictions for which these conditions and the query's parameters hold. most: if the
    query does not say."""
    listing.only("model", "class", "since", "until", "min_confidence", "max_confidence", "limit", "after", "format")
    where += conditions()
    owner, limit, after = access.whose(), listing.limit(MOST, most), listing.after("[0-9]{1,18}")
    if owner is not None:
        where.append(history.c.owner == owner)
    write = as_csv if is_csv() else as_json
    text, cursor, count = current_app.extensions["history"].page(where, after, limit, write, owner is None)
    response = Response(text, content_type="text/csv; charset=utf-8" if write is as_csv else "application/json")
    response.vary.add("Accept")
    if cursor:
        query = urllib.parse.urlencode([*((name, value) for name, value in request.args.items(multi=True)
                                          if name != "after"), ("after", cursor)])
        response.headers["Link"] = f"<{urllib.parse.quote(request.path)}?{query}>; rel=\"next\""
    return response, count


def conditions():
    """Those of the query's parameters. Raises ServiceError."""
    found = []
    model, name = text("model"), text("class")
    if model:
        base, _, version = model.partition("@")
        found.append(history.c.model == base)
        if version:
            found.append(history.c.version == version)
    if name:
        found.append(history.c.top_class == name)
    for parameter, condition in (("since", history.c.time.__ge__), ("until", history.c.time.__lt__)):
        moment = listing.moment(parameter)
        if moment is not None:
            found.append(condition(moment))
    for parameter, condition in (("min_confidence", history.c.confidence.__ge__),
                                 ("max_confidence", history.c.confidence.__le__)):
        value = number(parameter)
        if value is not None:
            found.append(condition(value))
    return found


def text(name):
    sent = listing.text(name)
    if sent and "\0" in sent:  # which PostgreSQL does not take
        raise invalid_parameter(name, "text", "a NUL character")
    return sent


def number(name):
    sent = listing.text(name)
    if sent is None:
        return None
    if not re.fullmatch(r"[-+]?[0-9]{1,9}(\.[0-9]{0,20})?([eE][-+]?[0-9]{1,2})?", sent, re.A):
        raise invalid_parameter(name, "a number", sent[:40])
    return float(sent)


def is_csv():
    """Whether the client wants CSV: by the parameter `format`, else by the header Accept. Raises ServiceError."""
    sent = listing.text("format")
    if sent not in (None, "json", "csv"):
        raise invalid_parameter("format", "json or csv", sent[:40])
    return sent == "csv" or sent is None and \
        request.accept_mimetypes.best_match(["application/json", "text/csv"]) == "text/csv"


class History:
    """Reads the table, within a time limit and without the event loop. threads: in which it does."""

    def __init__(self, database, threads):
        self.database, self.background = database, Background("HISTORY_UNAVAILABLE", AWAY, threads)

    def page(self, where, after, limit, write, with_owner):
        """(text of a page, cursor of the next one or None, number of predictions). after: (time, id) of the one before
        it; write: as_json or as_csv. Raises ServiceError."""
        return self.background.run(self.read, where, after, limit, write, with_owner)

    def read(self, where, after, limit, write, with_owner):
        if after is not None:
            where = [*where, tuple_(history.c.time, history.c.id) < tuple_(after[0], int(after[1]))]
        query = select(history).where(*where).order_by(history.c.time.desc(), history.c.id.desc()).limit(limit + 1)
        try:
            with self.database.read() as connection:
                rows = connection.execute(query).mappings().all()
        except OperationalError as e:
            if was_too_slow(e):
                raise ServiceError(503, "HISTORY_UNAVAILABLE", "This search took too long; narrow it with since and "
                                                               "until.", retry_after_s=5) from e
            raise
        last = rows[limit - 1] if len(rows) > limit else None
        cursor = last and listing.cursor(last["time"], str(last["id"]))
        found = [described(row, with_owner) for row in rows[:limit]]
        return write(found, cursor, with_owner), cursor, len(found)


def described(row, with_owner):
    """A prediction as JSON types; predictions: those that the client got, or null if they were too long to keep."""
    return {"time": round(row["time"], 6), "request_id": row["request_id"], "position": row["position"],
            "model": row["model"], "version": row["version"], "weights": row["weights"],
            "input_sha256": row["input_sha256"], "class": row["top_class"], "confidence": row["confidence"],
            "milliseconds": row["milliseconds"], "cached": row["cached"], "options": json.loads(row["options_json"]),
            "predictions": json.loads(row["predictions_json"]), **({"owner": row["owner"]} if with_owner else {})}


def as_json(found, cursor, with_owner):
    return json.dumps({"status": "success", "history": found, "next": cursor}, separators=(",", ":")) + "\n"


def as_csv(found, cursor, with_owner):
    """A table with a header; times in ISO 8601, options and predictions in JSON."""
    text = io.StringIO()
    table = csv.writer(text)
    columns = [*COLUMNS, *(["owner"] if with_owner else [])]
    table.writerow(columns)
    for one in found:
        at = datetime.datetime.fromtimestamp(one["time"], datetime.UTC).isoformat(timespec="milliseconds")
        json_texts = {name: json.dumps(one[name], ensure_ascii=False) for name in ("options", "predictions")}
        table.writerow([cell({**one, **json_texts, "time": at.replace("+00:00", "Z")}[name]) for name in columns])
    return text.getvalue()


def cell(value):
    """As a cell that no spreadsheet takes for a formula."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULAS) else value
