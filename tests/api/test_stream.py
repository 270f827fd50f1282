"""stream=true: server-sent events, as they come, and what becomes of the connection, the slot and the log."""
import base64
import contextlib
import dataclasses
import functools
import http.client
import io
import itertools
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import gevent
import numpy as np
import pytest
import requests
from conftest import encoded, photo
from gunicorn.http.body import Body, LengthReader
from gunicorn.http.unreader import SocketUnreader
from urllib3 import encode_multipart_formdata
from videos import pan_over, write
from werkzeug.test import EnvironBuilder

from app import create_app
from app.api import live as live_module
from app.api import stream as stream_module
from app.engine.slots import Slots
from app.server import arriving, worker

CAT, COFFEE = encoded(photo("chelsea"), "JPEG"), encoded(photo("coffee"), "PNG")
TEXT = b"hello, I am a text\n" * 50


@pytest.fixture(scope="module")
def video():
    return write(pan_over(np.asarray(photo("chelsea")), 60), codec="mpeg4")


def form(*files, **options):
    """(body, headers) of files as (name, bytes)."""
    body, content_type = encode_multipart_formdata([*[("files", file) for file in files], *options.items()])
    return body, {"Content-Type": content_type}


def events_of(text):
    """[(event, data)] of a whole stream; fails for anything else in it."""
    *events, rest = text.split("\n\n")
    assert rest == ""
    found = [re.fullmatch(r"event: (frame|error|end)\ndata: (.*)", one) for one in events]
    return [(one[1], json.loads(one[2])) for one in found]


def stream(client, *files, path="/predict", **options):
    body, headers = form(*files, stream="true", **options)
    response = client.post(path, data=body, headers=headers)
    assert response.status_code == 200, response.text
    assert response.headers["Content-Type"] == "text/event-stream"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["X-Accel-Buffering"] == "no"
    return events_of(response.text)


def nearly(number):
    return pytest.approx(number, abs=1e-5)


def about(value, number=nearly):
    """An answer without its timings: those differ, as may the last digits of inferences that are made one by one."""
    if isinstance(value, dict):
        return {k: about(v, number) for k, v in value.items() if k not in ("timings_ms", "inference_time")}
    if isinstance(value, list | tuple):
        return [about(one, number) for one in value]
    return number(value) if isinstance(value, float) else value


exactly = functools.partial(about, number=float)


def predict(client, data, **options):
    body, headers = form(("clip.mp4", data), **options)
    return client.post("/predict", data=body.replace(b'"files"', b'"file"'), headers=headers).json


def test_a_video_is_answered_frame_by_frame(client, video):
    *frames, (name, end) = stream(client, ("clip.mp4", video), frames="4")
    assert [name for name, _ in frames] == ["frame"] * 4
    expected = predict(client, video, frames="4")
    assert name == "end"
    assert exactly(end) == about(expected)
    assert [shot for _, shot in frames] == about(expected["metadata"]["frames"])
    assert end["metadata"]["timings_ms"].keys() == expected["metadata"]["timings_ms"].keys()


def test_where_the_model_looked_in_each_frame(client, video):
    *frames, (_, end) = stream(client, ("clip.mp4", video), frames="2", explain="true", explain_class="281")
    expected = predict(client, video, frames="2", explain="true", explain_class="281")
    assert exactly([shot["explanations"][0]["map"] for _, shot in frames]) == about(
        [shot["explanations"][0]["map"] for shot in expected["metadata"]["frames"]])
    assert end["metadata"]["uncertainty"] == about(expected["metadata"]["uncertainty"])
    assert frames[0][1]["explanations"][0]["overlay"]


def test_faces_of_a_video(ocean_settings, ocean_app):
    client = ocean_app.test_client()
    frames = [np.asarray(photo("astronaut").crop((0, 0, 384, 384)))] * 6 + [np.zeros((384, 384, 3), np.uint8)] * 6
    video = write(frames, codec="mpeg4")
    *events, (name, end) = stream(client, ("clip.mp4", video), frames="2", method="face")
    assert [shot["face_detected"] for _, shot in events] == [True, False]
    assert len(events[0][1]["face_box"]) == 4
    assert set(events[0][1]["predictions"]) == set(end["predictions"])
    assert "predictions" not in events[1][1]
    assert exactly(end) == about(predict(client, video, frames="2", method="face"))


def test_an_error_after_the_first_event_is_an_event(ocean_app):
    client = ocean_app.test_client()
    video = write([np.zeros((384, 384, 3), np.uint8)] * 6, codec="mpeg4")
    first, second, (name, error) = stream(client, ("clip.mp4", video), frames="2", method="face")
    assert (first[0], second[0], name) == ("frame", "frame", "error")
    assert error["error"] == "NO_FACE_FOUND"
    assert sorted(error) == ["error", "message", "request_id", "status"]


def test_pictures_of_which_one_is_none(client):
    *events, (name, end) = stream(client, ("a.jpg", CAT), ("b.jpg", TEXT), ("c.png", COFFEE), top_k="1")
    assert (name, end) == ("end", {"status": "success", "count": 3, "failed": 1})
    events.sort(key=lambda event: event[1]["index"])
    assert [(name, data["filename"], data["status"]) for name, data in events] == [
        ("frame", "a.jpg", "success"), ("error", "b.jpg", "error"), ("frame", "c.png", "success")]
    assert [data["predictions"][0]["class"] for _, data in (events[0], events[2])] == ["tiger cat", "espresso"]
    assert events[1][1]["error"] == "INVALID_IMAGE"
    assert events[0][1]["predictions"] == about(predict(client, CAT, top_k="1")["predictions"])


@pytest.mark.parametrize("send", [
    lambda client: client.post("/predict", json={"instances": [base64.b64encode(CAT).decode()] * 2, "stream": True}),
    lambda client: client.post("/predict?stream=1", json={"instances": [base64.b64encode(CAT).decode()] * 2})])
def test_pictures_in_json(client, send):
    *events, (name, end) = events_of(send(client).text)
    assert [data["predictions"][0]["class"] for _, data in events] == ["tiger cat"] * 2
    assert (name, end["count"]) == ("end", 2)


def test_one_picture_as_the_raw_body(client):
    response = client.put("/predict?stream=true", data=CAT, headers={"Content-Type": "image/jpeg"})
    (name, data), (last, end) = events_of(response.text)
    assert (name, data["index"], data["filename"]) == ("frame", 0, None)
    assert (last, end["count"], end["failed"]) == ("end", 1, 0)


def test_pictures_of_a_client_that_leaves_make_room(app, capfd):
    body, headers = form(*[(f"{i}.jpg", CAT) for i in range(20)], stream="true")
    response = app.test_client().post("/predict", data=body, headers=headers, buffered=False)
    assert next(response.response).startswith(b"event: frame")
    slots = app.extensions["model"].slots
    assert slots.batched > 0
    response.close()
    with gevent.Timeout(30):
        while slots.batched or slots.waiting or slots.running:
            gevent.sleep(0.01)
    assert app.extensions["bodies"].total == 0
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(("files", "options", "code"), [
    ([("a.jpg", TEXT)], {}, "INVALID_IMAGE"), ([("a.jpg", b"")], {}, "EMPTY_FILE"), ([], {}, "MISSING_FILE"),
    ([("a.jpg", CAT)], {"stream": "maybe"}, "INVALID_PARAMETER"),
    ([("a.jpg", CAT)], {"top_k": "0"}, "INVALID_PARAMETER"), ([("a.jpg", b"x")] * 33, {}, "TOO_MANY_FILES")])
def test_an_error_before_the_first_event_is_an_answer(client, files, options, code):
    body, headers = form(*files, **{"stream": "true", **options})
    response = client.post("/predict", data=body, headers=headers)
    assert (response.status_code, response.json["error"]) == (400, code)
    assert response.headers["Content-Type"] == "application/json"


def test_a_video_that_cannot_be_read(client, video):
    body, headers = form(("clip.mp4", video[:2000]), stream="true")
    assert client.post("/predict", data=body, headers=headers).json["error"] == "INVALID_VIDEO"


def test_false_is_no_stream(client):
    assert client.put("/predict?stream=false", data=CAT, headers={"Content-Type": "image/jpeg"}).json["status"] == \
        "success"
    body, headers = form(("a.jpg", CAT), stream="true")
    assert client.post("/predict/batch", data=body, headers=headers).json["count"] == 1


def test_keys_limits_cache_and_history(settings, app, video):
    made = create_app(dataclasses.replace(settings, api_keys=("a-key",), rate_limit="7/minute", cache_url="memory://"),
                      app.extensions["model"])
    client, recorded = made.test_client(), []
    made.extensions["record"] = lambda *record: recorded.append(record)
    assert client.post("/predict?stream=true").json["error"] == "UNAUTHORIZED"
    client.environ_base["HTTP_X_API_KEY"] = "a-key"
    first = stream(client, ("clip.mp4", video), frames="2")
    assert exactly(stream(client, ("clip.mp4", video), frames="2")) == exactly(first)
    assert [(record[4], len(record)) for record in recorded] == [(False, 5), (True, 5)]
    *_, (_, end) = stream(client, ("a.jpg", CAT), ("b.jpg", CAT), ("c.jpg", CAT))
    assert end["count"] == 3
    assert sorted(record[5] for record in recorded[2:]) == [0, 1, 2]
    body, headers = form(("a.jpg", CAT), ("b.jpg", CAT), ("c.jpg", CAT), stream="true")
    response = client.post("/predict", data=body, headers=headers)
    assert (response.status_code, response.json["error"]) == (429, "RATE_LIMITED")


# --- bodies that are answered while they arrive ---

MJPEG = {"Content-Type": "video/x-motion-jpeg"}


class Arriving:
    """A request's body, of which each piece is made when the service reads it."""

    def __init__(self, pieces):
        self.pieces = iter(pieces)

    def read(self, size):
        return next(self.pieces, b"")


def put_live(app, pieces):
    return app.test_client().put("/predict?stream=true", headers=MJPEG, buffered=False,
                                 environ_overrides={"wsgi.input": Arriving(pieces)})


def in_progress(app):
    return re.search(r"^model_server_requests_in_progress (.*)$", app.test_client().get("/metrics").text, re.M)[1]


def test_a_live_body_may_have_any_length(client):
    response = client.put("/predict?stream=true", data=20 * CAT, headers=MJPEG)
    *_, (name, end) = events_of(response.text)
    assert (name, end["count"] + end["skipped"]) == ("end", 20)
    response = client.put("/predict?stream=true&top_k=99", data=20 * CAT, headers=MJPEG)
    assert (response.status_code, response.json["error"]) == (400, "INVALID_PARAMETER")
    assert response.json["message"].startswith("top_k")


def test_a_body_of_a_live_type_is_not_live_without_stream(client):
    mixed = {"Content-Type": "multipart/x-mixed-replace"}
    response = client.put("/predict?stream=false", data=CAT, headers=mixed)
    assert (response.status_code, response.json["error"]) == (415, "UNSUPPORTED_MEDIA_TYPE")
    assert client.put("/predict?stream=false", data=CAT, headers=MJPEG).json["metadata"]
    response = client.put("/predict?stream=maybe", data=CAT, headers=mixed)
    assert (response.status_code, response.json["error"]) == (400, "INVALID_PARAMETER")
    assert response.json["message"].startswith("stream")


def test_live_bodies_count_and_the_largest_is_refused(settings, app):
    tight = create_app(dataclasses.replace(settings, max_body_memory=30_000), app.extensions["model"])
    bodies, never = tight.extensions["bodies"], gevent.event.Event()

    def pieces():
        yield CAT[:20_000]
        never.wait()
    with bodies.one() as other:
        bodies.receiving[other] = gevent.getcurrent()
        live = gevent.spawn(put_live, tight, pieces())
        with gevent.Timeout(10):
            while bodies.total < 20_000:
                gevent.sleep(0.01)
            bodies.add(other, 15_000)
            response = live.get()
        assert (response.status_code, response.json["error"]) == (503, "OVERLOADED")
        assert bodies.total == 15_000


def test_a_live_body_counts_what_is_answered_what_waits_and_what_arrives(app):
    bodies, sizes, go_on = app.extensions["bodies"], [], gevent.event.Event()

    def pieces():
        yield CAT
        sizes.append(bodies.total)
        go_on.wait()
        yield CAT
        sizes.append(bodies.total)
        yield CAT[:1000]
        sizes.append(bodies.total)
        gevent.sleep(60)
    response = put_live(app, pieces())  # one is answered, and nothing more until someone takes the answer
    go_on.set()
    with gevent.Timeout(10):
        while len(sizes) < 3:
            gevent.sleep(0.01)
    assert sizes == [len(CAT), 2 * len(CAT), 2 * len(CAT) + 1000]
    response.close()
    assert bodies.total == 0


def test_tiny_pictures_leave_others_their_turns(app):
    turns, seen = 0, []

    def others():
        nonlocal turns
        while True:
            gevent.sleep(0.001)
            turns += 1

    def pieces():
        seen.append(turns)
        yield b"\xff\xd8\xff\xd9" * 50
        seen.append(turns)
    greenlet = gevent.spawn(others)
    *_, (name, end) = events_of(put_live(app, pieces()).text)
    greenlet.kill()
    assert (name, end["count"] + end["skipped"]) == ("end", 50)
    assert seen[1] - seen[0] >= 50


def test_a_picture_of_too_many_segments_ends_a_live_body(client):
    response = client.put("/predict?stream=true", headers=MJPEG, data=b"\xff\xd8" + b"\xff\xe0\x00\x02" * 1000)
    assert (response.status_code, response.json["error"]) == (400, "INVALID_IMAGE")
    assert "more than 200 segments" in response.json["message"]


def test_a_body_without_end_leaves_others_the_loop(app):
    turns = 0

    def others():
        nonlocal turns
        while True:
            gevent.sleep(0.0001)
            turns += 1
    greenlet = gevent.spawn(others)
    response = put_live(app, [b"\xff\xd8\xff\xe0\x00\x02", *[b"\xff\x00" * 2**15] * 100])
    greenlet.kill()
    assert response.json["error"] == "MISSING_FILE"
    assert turns >= 20  # 120 to 130; fewer on a faster processor


def test_live_streams_are_few_in_a_worker_and_of_a_client(app, monkeypatch):
    monkeypatch.setattr(app.extensions["model"], "slots", Slots(1, max_queue=2))
    never = gevent.event.Event()

    def pieces():
        yield CAT[:1000]
        never.wait()

    def ask(address):
        return app.test_client().put("/predict?stream=true", headers=MJPEG, environ_overrides={
            "wsgi.input": Arriving(pieces()), "REMOTE_ADDR": address})

    def refused(address):
        response = ask(address)
        return response.status_code, response.json["error"], response.headers["Retry-After"]
    held = []
    for address, count in (("10.0.0.1", 1), ("10.0.0.1", 2), ("10.0.0.2", 3)):
        held.append(gevent.spawn(ask, address))
        with gevent.Timeout(10):
            while app.extensions.get("live", {}).get(address, 0) < (1 if count == 3 else count):
                gevent.sleep(0.01)
        if count == 2:
            assert refused("10.0.0.1") == (429, "RATE_LIMITED", "5")
    assert refused("10.0.0.3") == (503, "OVERLOADED", "5")
    gevent.killall(held)
    assert app.extensions["live"].total() == len(app.extensions["live"]) == 0


def test_silence_is_broken_by_comments(app, monkeypatch):
    for module in (stream_module, live_module):
        monkeypatch.setattr(module, "SILENT_S", 0.05)
    go_on = gevent.event.Event()

    def pieces():
        yield CAT
        go_on.wait()
    events = iter(put_live(app, pieces()).response)
    assert next(events).startswith(b"event: frame")
    assert [next(events), next(events)] == [b":\n\n"] * 2
    go_on.set()
    assert [one for one in events if one != b":\n\n"][0].startswith(b"event: end")

    silence = gevent.event.Event()

    def work(put):
        gevent.sleep(0.2)  # before the first event, errors are still answers: nothing may be sent
        for _ in range(2):
            silence.clear()
            put("event")
            silence.wait(10)
    found = []
    for one in stream_module.produced(work):
        found.append(one)
        if one == ":\n\n":
            silence.set()
    assert [one for one, _ in itertools.groupby(found)] == ["event", ":\n\n", "event", ":\n\n"]


class Counting(Slots):
    refused = 0

    def overloaded(self):
        self.refused += 1
        return super().overloaded()


def test_overload_skips_a_picture(app, monkeypatch):
    slots, go_on = Counting(1, max_queue=4), gevent.event.Event()
    slots.start()
    monkeypatch.setattr(app.extensions["model"], "slots", slots)
    recorded = []
    monkeypatch.setitem(app.extensions, "record", lambda *prediction: recorded.append(prediction[-1]))

    def pieces():
        yield CAT
        go_on.wait()
        slots.max_queue = -1  # full
        yield CAT
        while not slots.refused:
            gevent.sleep(0.001)
        slots.max_queue = 4
        yield CAT
    response = put_live(app, pieces())
    go_on.set()
    first, second, (name, end) = events_of(response.text)
    assert [event[1]["index"] for event in (first, second)] == recorded == [0, 2]  # as positions in the history
    assert (name, end["count"], end["failed"], end["skipped"]) == ("end", 2, 0, 1)


def test_a_stream_that_nobody_begins_to_read_leaves_nothing(app):
    def pieces():
        yield CAT
        gevent.sleep(60)

    def ask_and_leave(**request):
        environ = EnvironBuilder(method="POST", **request).get_environ()
        app(environ, lambda status, headers: statuses.append(status)).close()
    before, slots, bodies, statuses = in_progress(app), app.extensions["model"].slots, app.extensions["bodies"], []
    ask_and_leave(path="/predict?stream=true", headers=MJPEG,
                  environ_overrides={"wsgi.input": Arriving(pieces())})
    assert (in_progress(app), bodies.total, bodies.receiving) == (before, 0, {})
    body, headers = form(*[(f"{i}.jpg", CAT) for i in range(3)], stream="true")
    ask_and_leave(path="/predict", data=body, headers=headers)
    with gevent.Timeout(30):
        while slots.batched:
            gevent.sleep(0.01)
    assert (in_progress(app), bodies.total) == (before, 0)
    assert statuses == ["200 OK"] * 2


# --- over real connections ---

ATTEMPTS = 5  # at what has to happen within a stream of half a second

@pytest.fixture(scope="module")
def long_video():
    return write(pan_over(np.asarray(photo("chelsea").resize((1600, 1200))), 64), codec="mpeg4")


def metric(service, name):
    return float(re.search(rf"^model_server_{name} (.*)$", requests.get(service.url + "/metrics", timeout=10).text,
                           re.M)[1])


def until(condition, within_s=30):
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@contextlib.contextmanager
def opened(service, body, headers, path="/predict", version="HTTP/1.1"):
    """A socket to which the request has been written."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as sock:
        lines = [f"POST {path} {version}", "Host: x", f"Content-Length: {len(body)}",
                 *[f"{name}: {value}" for name, value in headers.items()]]
        sock.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        yield sock


def read_until(sock, ending):
    data = b""
    while ending not in data:
        piece = sock.recv(4096)
        assert piece, data
        data += piece
    return data


def logged(service, request_id):
    lines = []
    until(lambda: lines.extend(line for line in service.log.splitlines() if request_id in line
                               and '"request"' in line) or lines)
    return json.loads(lines[0])


def test_events_arrive_while_the_rest_is_calculated(service, long_video):
    """Again where all had been calculated by the time that this process had looked."""
    body, headers = form(("clip.mp4", long_video), stream="true", frames="32")
    seen = []
    for i in range(ATTEMPTS):
        with opened(service, body, {**headers, "X-Request-ID": f"long-stream-{i}"}) as sock:
            assert b"event: frame" in read_until(sock, b"\n\n\r\n")
            seen.append((metric(service, "slots_in_use"), metric(service, "requests_in_progress"),
                         f"long-stream-{i}" in service.log))
            read_until(sock, b"event: end")
        line = logged(service, f"long-stream-{i}")
        assert line["status"] == 200
        assert line["duration_ms"] > line["timings_ms"]["inference"] > 0
        if seen[-1] == (1, 2, False):
            break
    assert seen[-1] == (1, 2, False), seen


def test_a_client_that_leaves_frees_its_slot(service, long_video):
    body, headers = form(("clip.mp4", long_video), stream="true", frames="32")
    outcomes = []
    for i in range(ATTEMPTS):
        with opened(service, body, {**headers, "X-Request-ID": f"left-early-{i}"}) as sock:
            read_until(sock, b"event: frame")
        line = logged(service, f"left-early-{i}")
        outcomes.append((line["status"], line.get("error")))
        if outcomes[-1] != (200, None):  # else it left too late
            break
    assert outcomes[-1] == (499, "CLIENT_CLOSED_REQUEST"), outcomes
    until(lambda: metric(service, "slots_in_use") == 0)
    until(lambda: metric(service, "requests_in_progress") == 1)
    until(lambda: metric(service, "body_bytes") == 0)


def test_a_connection_is_kept_after_a_stream(service):
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
    body, headers = form(("a.jpg", CAT), ("b.jpg", CAT), stream="true")
    with contextlib.closing(connection):
        for _ in range(2):
            connection.request("POST", "/predict", body, headers)
            response = connection.getresponse()
            assert [name for name, _ in events_of(response.read().decode())] == ["frame", "frame", "end"]
            sock = connection.sock
        connection.request("PUT", "/predict", CAT, {"Content-Type": "image/jpeg"})
        assert json.loads(connection.getresponse().read())["status"] == "success"
        assert connection.sock is sock


def test_a_body_in_chunks(service):
    answer = requests.put(service.url + "/predict?stream=true", data=iter([CAT[:999], CAT[999:]]), timeout=30,
                          headers={"Content-Type": "image/jpeg"})
    assert [name for name, _ in events_of(answer.text)] == ["frame", "end"]


def test_http_1_0(service):
    body, headers = form(("a.jpg", CAT), stream="true")
    with opened(service, body, headers, version="HTTP/1.0") as sock:
        answer = b""
        while piece := sock.recv(4096):
            answer += piece
    head, _, text = answer.decode().partition("\r\n\r\n")
    assert "Transfer-Encoding" not in head
    assert [name for name, _ in events_of(text)] == ["frame", "end"]


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


@contextlib.contextmanager
def live(service, content_type, query="stream=true&top_k=1", **headers):
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as sock:
        lines = [f"PUT /predict?{query} HTTP/1.1", "Host: x", "Transfer-Encoding: chunked",
                 f"Content-Type: {content_type}", *[f"{name}: {value}" for name, value in headers.items()]]
        sock.sendall("\r\n".join([*lines, "", ""]).encode())
        yield sock


def test_a_camera_is_answered_while_it_sends(service):
    with live(service, "multipart/x-mixed-replace;boundary=ffmpeg", **{"X-Request-ID": "camera"}) as sock:
        part = b"--ffmpeg\r\nContent-type: image/jpeg\r\nContent-length: %d\r\n\r\n%s\r\n"
        cat, fill = part % (len(CAT), CAT), b" " * 1024  # in which the end of a picture arrives
        sock.sendall(chunk(cat[:5000]) + chunk(cat[5000:] + fill))
        assert b'"tiger cat"' in read_until(sock, b"\n\n\r\n")
        sock.sendall(chunk(part % (len(CAT) // 2, CAT[:-1000] + b"\xff\xd9") + fill))
        assert b'"index": 1' in read_until(sock, b"\n\n\r\n")
        sock.sendall(chunk(40 * cat + fill) + b"0\r\n\r\n")
        end = read_until(sock, b"\r\n0\r\n\r\n")
    counts = json.loads(re.search(rb'\{"status": "success", "count": .*\}', end)[0])
    assert counts["count"] + counts["skipped"] == 42
    assert counts["skipped"] > 0
    assert counts["is_complete"]
    assert logged(service, "camera")["status"] == 200
    until(lambda: metric(service, "body_bytes") == 0)


def test_a_saved_camera_stream_with_its_length(service):
    count, sizes = 12 * 2**20 // len(CAT), []  # more than one picture may have
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(requests.put, service.url + "/predict?stream=true&top_k=1", data=io.BytesIO(count * CAT),
                           headers={"Content-Type": "video/x-motion-jpeg"}, timeout=30)
        while not sent.done():
            sizes.append(metric(service, "body_bytes"))
            time.sleep(0.02)
        answer = sent.result()
    assert answer.status_code == 200, answer.text
    *frames, (name, end) = events_of(answer.text)
    assert {one["predictions"][0]["class"] for _, one in frames} == {"tiger cat"}
    assert name == "end"
    assert end["count"] + end["skipped"] == count
    assert end["is_complete"]
    assert 0 < max(sizes) < 4 * len(CAT)


def test_what_follows_a_live_body_is_the_next_request(service):
    small = encoded(photo("chelsea").resize((32, 32)), "JPEG")  # all of it arrives at once
    head = (f"PUT /predict?stream=true&top_k=1 HTTP/1.1\r\nHost: x\r\nContent-Type: video/x-motion-jpeg\r\n"
            f"Content-Length: {len(small)}\r\n\r\n").encode()
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as sock:
        sock.sendall(head + small + b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
        answers = read_until(sock, b'"alive"')
    assert answers.count(b"event: frame") == answers.count(b"event: end") == 1


def test_a_live_body_that_is_cut_off_is_no_whole_one(service):
    with live(service, "video/x-motion-jpeg", **{"X-Request-ID": "cut-off"}) as sock:
        sock.sendall(b"%x\r\n" % (10 * len(CAT)) + CAT)
        read_until(sock, b"event: frame")
    assert logged(service, "cut-off")["error"] in ("BAD_REQUEST", "CLIENT_CLOSED_REQUEST")


def test_a_body_that_is_cut_off_has_not_ended():
    client, server = socket.socketpair()
    with client, server:
        body = Body(LengthReader(SocketUnreader(server), 10))
        body.read1 = functools.partial(worker.read1, body.reader)
        live_body = arriving.Arriving(body, 2**18)
        client.sendall(b"12345")
        assert live_body.read() == b"12345"
        client.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionError):
            live_body.read()
    assert body.failed


def test_a_camera_that_goes_on_is_ended_at_the_deadline(service):
    with live(service, "video/x-motion-jpeg", **{"X-Request-Timeout": "2"}) as sock:
        sock.sendall(chunk(CAT + bytes(1024)))
        assert b'"is_complete": false' in read_until(sock, b"0\r\n\r\n")
        sock.sendall(chunk(CAT))
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""
    assert "Traceback" not in service.log
    assert 'status="500"' not in requests.get(service.url + "/metrics", timeout=10).text


@pytest.mark.parametrize(("body", "code"), [
    (b"0\r\n\r\n", "MISSING_FILE"), (chunk(TEXT) + b"0\r\n\r\n", "MISSING_FILE"),
    (chunk(b"\xff\xd8\xff" + bytes(11 * 2**20)), "FILE_TOO_LARGE")])
def test_a_camera_that_sends_no_pictures(service, body, code):
    with live(service, "video/x-motion-jpeg") as sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        sock.sendall(body)
        assert code.encode() in read_until(sock, b'"request_id"')


def test_a_client_that_does_not_read_is_cut_off(start_service):
    service = start_service(MODEL_NAME="tests.own_tasks:Long", REQUEST_TIMEOUT="3", WORKERS="1").wait_ready()
    body = json.dumps({"instances": ["a", "b", "c"] * 10, "stream": True}).encode()
    headers = {"Content-Type": "application/json"}
    with opened(service, body, {**headers, "X-Request-ID": "does-not-read"}):
        until(lambda: "slots_in_use 0.0" in requests.get(service.url + "/metrics", timeout=10).text)
        *events, (name, end) = events_of(requests.post(service.url + "/predict?stream=true", timeout=10, json={
            "instances": ["x", "y"]}).text)
        assert [event[1]["predictions"][0] for event in sorted(events, key=str)] == ["x", "y"]
        assert (name, end["count"]) == ("end", 2)
        line = logged(service, "does-not-read")
        assert (line["status"], line["error"]) == (499, "CLIENT_CLOSED_REQUEST")
        until(lambda: metric(service, "connections_cut_off_total") == 1)
        until(lambda: metric(service, "body_bytes") == 0)


def test_the_deadline_is_that_of_the_whole_stream(service, long_video):
    body, headers = form(("clip.mp4", long_video), stream="true", frames="32")
    with opened(service, body, {**headers, "X-Request-Timeout": "0.1", "X-Request-ID": "too-late"}) as sock:
        assert b"DEADLINE_EXCEEDED" in read_until(sock, b"request_id")
    line = logged(service, "too-late")
    assert (line["status"], line["error"]) == (504, "DEADLINE_EXCEEDED")

