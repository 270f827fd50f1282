"""The benchmark's load generator counts and checks right: a benchmark that cannot fail proves nothing."""
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
    before = served(service)
    result = put_load(service, chelsea, right, **options)
    sent = served(service) - before
    assert result["right"] >= 1
    assert result["wrong"] == result["non_200"] == 0
    assert result["probability_off"] < 1e-6
    assert 0 <= sent - result["right"] <= options.get("connections", 0)  # those under way at the end are not counted
    assert result["throughput"] > 0  # how much depends on when in the time the answers came
    assert result["latency_ms"]["p50"] <= result["latency_ms"]["p95"] <= result["latency_ms"]["p99"]
    assert sum(result["stages_ms"].values()) <= 2 * result["latency_ms"]["mean"]  # stages are those of a few more


def test_wrong_class_is_counted_as_wrong(service, chelsea, right):
    result = put_load(service, chelsea, [right[0] + 1, right[1]], connections=2)
    assert result["right"] == 0
    assert result["wrong"] > 2
    assert result["throughput"] == 0


@pytest.mark.parametrize(("tolerance", "counted_as"), [(1e-3, "wrong"), (0.02, "right"), (None, "right")])
def test_probability_is_checked_to_the_tolerance(service, chelsea, right, tolerance, counted_as):
    result = put_load(service, chelsea, [right[0], right[1] + 0.01], tolerance, connections=1)
    assert result[counted_as] > 2
    assert result["wrong"] + result["right"] == result[counted_as]
    assert result["probability_off"] == pytest.approx(0.01, abs=1e-5)


def test_refusals_are_counted_by_status(service, tmp_path, right):
    (tmp_path / "text.jpg").write_text("no picture")
    result = put_load(service, str(tmp_path / "text.jpg"), right, connections=2)
    assert list(result["statuses"]) == ["400"]
    assert result["non_200"] == result["statuses"]["400"] > 2
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
    result = put_load(service, chelsea, right, rate=400)
    alone = put_load(service, chelsea, right, connections=1)
    assert result["latency_ms"]["p95"] > 2 * alone["latency_ms"]["p50"]
    assert result["wrong"] == result["lost"] == 0


def test_evenly_spaced_requests_are_not_bunched(service, chelsea, right):
    result = put_load(service, chelsea, right, rate=20, even=True)
    assert 9 <= result["right"] <= 10
    assert result["drain_s"] < 5


def test_refusals_without_retry_after_are_told_apart():
    tally = load.Tally([[1, 0.5]], None)
    for status, retry_after in ((503, None), (503, b"1"), (400, None)):
        tally.add(0, status, b"{}", 0.1, 1.0, counted=True, retry_after=retry_after)
    assert tally.bare_refusals == 1
