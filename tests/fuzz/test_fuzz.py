"""Damaged files and bodies end as an answer or as the client's error, never as anything else: a few thousand seeded
mutations, and what `make fuzz` has found."""
import random
import time
from pathlib import Path

import pytest
from conftest import encoded, photo, post
from mutations import bodies, mutated, pictures
from targets import TARGETS, with_correct_checksums

FINDINGS = sorted((Path(__file__).parent / "findings").iterdir())
MOST_S = 2  # of processor time, as other tests run beside this one
pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's about damaged files; as errors they would hide others


def in_time(run, data):
    started = time.process_time()
    run(data)
    assert time.process_time() - started < MOST_S


@pytest.mark.parametrize("name", pictures())
def test_mutated_pictures(name):
    run, data, order = TARGETS["pictures"][0], pictures()[name], random.Random(0)
    for _ in range(60):
        in_time(run, with_correct_checksums(mutated(data, order)))


@pytest.mark.parametrize("target", ["containers", "json", "uploads"])
def test_mutated_bodies(target):
    (run, seeds), order = TARGETS[target], random.Random(0)
    for data in seeds():
        for _ in range(100):
            in_time(run, mutated(data, order))


def test_mutated_requests_through_the_whole_application(client):
    order, statuses = random.Random(0), set()
    for content_type, body in bodies():
        for _ in range(20):
            response = client.post("/predict", data=mutated(body, order), content_type=content_type)
            statuses.add(response.status_code)
            assert response.status_code == 200 or response.json["status"] == "error"
    assert statuses <= {200, 400, 413, 415}
    assert statuses >= {200, 400}  # some are still readable, some are not


@pytest.mark.parametrize("path", FINDINGS, ids=lambda path: path.name)
def test_findings(client, path):
    run, _ = TARGETS[path.name.partition("-")[0]]
    in_time(run, path.read_bytes())
    response = post(client, path.read_bytes())
    assert (response.status_code, response.json["status"]) == (400, "error")


def test_a_checksum_is_corrected():
    data = encoded(photo("chelsea").resize((9, 9)))
    assert with_correct_checksums(data) == data
    assert with_correct_checksums(data[:-12] + data[-12:-1] + b"x") == data
