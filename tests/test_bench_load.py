"""The benchmark's load generator counts and checks right: a benchmark that cannot fail proves nothing."""
import itertools
import time

import pytest
from conftest import encoded, free_port, photo

from bench import load


@pytest.fixture(scope="module")
def chelsea(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "chelsea.jpg"
    path.write_bytes(encoded(photo("chelsea"), "JPEG"))
    return str(path)


@pytest.fixture(scope="module")
def right(service, chelsea):
    """[class_id, probability] as the service answers when asked otherwise."""
    with open(chelsea, "rb") as f:
        best = service.predict(f.read()).json()["predictions"][0]
    return [best["class_id"], best["confidence"]]


def put_load(service, file, expected, tolerance=1e-3, **options):
    return load.run({"port": service.port, "path": "/predict", "files": [file], "expected": [expected],
                     "tolerance": tolerance, "warm_s": 0, "seconds": 0.5, **options})


def served(service):
    return service.log.count('"path": "/predict"')


@pytest.mark.parametrize("options", [{"connections": 1}, {"connections": 4}, {"rate": 40},
                                     {"rate": 40, "even": True}])
def test_right_answers_are_counted(service, chelsea, right, options):
    before, started = served(service), time.monotonic()
    result = put_load(service, chelsea, right, **options)
    sent = served(service) - before
    assert result["right"] >= 1
    assert result["wrong"] == result["non_200"] == 0
    assert result["probability_off"] < 1e-6
    assert 0 <= sent - result["right"] <= options.get("connections", 0)  # those under way at the end are not counted
    assert result["throughput"] > 0  # how much depends on when in the time the answers came
    assert result["latency_ms"]["p50"] <= result["latency_ms"]["p95"] <= result["latency_ms"]["p99"]
    assert 0 < sum(result["stages_ms"].values()) < 1000 * (time.monotonic() - started)


def test_wrong_class_is_counted_as_wrong(service, chelsea, right):
    result = put_load(service, chelsea, [right[0] + 1, right[1]], connections=2)
    assert result["right"] == 0
    assert result["wrong"] > 0
    assert result["throughput"] == 0


@pytest.mark.parametrize(("tolerance", "counted_as"), [(1e-3, "wrong"), (0.02, "right"), (None, "right")])
def test_probability_is_checked_to_the_tolerance(service, chelsea, right, tolerance, counted_as):
    result = put_load(service, chelsea, [right[0], right[1] + 0.01], tolerance, connections=1)
    assert result[counted_as] > 0
    assert result["wrong"] + result["right"] == result[counted_as]
    assert result["probability_off"] == pytest.approx(0.01, abs=1e-5)


def test_refusals_are_counted_by_status(service, tmp_path, right):
    (tmp_path / "text.jpg").write_text("no picture")
    result = put_load(service, str(tmp_path / "text.jpg"), right, connections=2)
    assert list(result["statuses"]) == ["400"]
    assert result["non_200"] == result["statuses"]["400"] > 0
    assert result["right"] == result["wrong"] == 0
    assert result["refused_ms"]["p50"] > 0


def test_requests_that_nobody_takes_are_counted_as_lost(chelsea, right):
    nobody = type("Nobody", (), {"port": free_port()})
    for options in ({"connections": 1}, {"rate": 40}):
        result = put_load(nobody, chelsea, right, **options)
        assert result["non_200"] == result["lost"] > 2
        assert result["throughput"] == 0


def test_open_loop_counts_latency_from_when_a_request_was_due(service, chelsea, right, monkeypatch):
    """Requests come faster than one connection can carry them: those that had to wait in the client show it."""
    monkeypatch.setattr(load, "MOST_CONNECTIONS", 1)
    alone_s = put_load(service, chelsea, right, connections=1)["latency_ms"]["p50"] / 1000
    result = put_load(service, chelsea, right, rate=10 / alone_s, seconds=max(0.3, 15 * alone_s))
    assert result["latency_ms"]["p95"] > 2 * 1000 * alone_s
    assert result["wrong"] == result["lost"] == 0


def test_evenly_spaced_requests_are_not_bunched(service, chelsea, right, monkeypatch):
    due, send = [], load.Connection.send
    monkeypatch.setattr(load.Connection, "send", lambda self, request, data: due.append(request[1]) or send(
        self, request, data))
    result = put_load(service, chelsea, right, rate=20, even=True)
    assert 1 < result["right"] == len(due) <= 10
    assert [after - before for before, after in itertools.pairwise(due)] == pytest.approx([1 / 20] * (len(due) - 1))


def test_refusals_without_retry_after_are_told_apart():
    tally = load.Tally([[1, 0.5]], None)
    for status, retry_after in ((503, None), (503, b"1"), (400, None)):
        tally.add(0, status, b"{}", 0.1, 1.0, counted=True, retry_after=retry_after)
    assert tally.bare_refusals == 1
