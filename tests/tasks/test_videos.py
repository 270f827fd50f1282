"""The frames of a video are worked on side by side: the answers are those of one frame after the other, and nothing
stays behind."""
import threading
import time
import weakref

import gevent
import numpy as np
import pytest
from conftest import encoded, photo
from opencv_faces import collage
from videos import pan_over, write

from app.engine import pieces
from app.engine.slots import Slots
from app.errors import Deadline, DeadlineExceeded, ServiceError
from app.media import faces, video
from app.server.counters import Stages
from app.tasks import Call
from app.tasks.options import read
from app.tasks.videos import Overlapping


@pytest.fixture(scope="module")
def clip():
    return write(pan_over(np.asarray(photo("astronaut").resize((640, 640))), 60, 360, 300), g="20")


@pytest.fixture
def answer(ocean_app, monkeypatch):
    """answer(data, cores, seconds, see, **options) of the OCEAN model, with this many cores for pieces."""
    loader = ocean_app.extensions["model"]

    def call(data, cores, seconds=60.0, see=None, **options):
        monkeypatch.setattr(loader.slots, "cores", cores)
        monkeypatch.setattr(loader.slots, "count", 3)
        chosen = read(lambda name, _: options.get(name), loader.current.task)
        deadline, stages = Deadline(seconds), Stages()
        return loader.slots.run(lambda: loader.current.answer(data, chosen, Call(deadline, stages, see=see)), deadline,
                                stages)
    yield call
    until = time.monotonic() + 10
    while (loader.slots.running or loader.slots.helping) and time.monotonic() < until:
        time.sleep(0.01)
    assert not loader.slots.running
    assert not loader.slots.helping
    assert not (loader.slots.offers and loader.slots.offers.pieces)


def numbers(found):
    return np.array([list(found["predictions"].values()), list(found["metadata"]["spread"].values()),
                     *[list(shot["predictions"].values()) for shot in found["metadata"]["frames"]
                       if "predictions" in shot]])


def frames_of(found):
    return [{name: value for name, value in shot.items() if name != "predictions"}
            for shot in found["metadata"]["frames"]]


@pytest.mark.parametrize("asked", [{"tta": "false"}, {"method": "face", "embedding": "true"}])
def test_the_answer_is_that_of_one_frame_after_the_other(answer, clip, asked):
    seen, threads, lock = [], set(), threading.Lock()

    def see(index, _):
        with lock:
            seen.append(index)
            threads.add(threading.current_thread().name)
    alone = answer(clip, 1, frames="8", **asked)
    shared = answer(clip, 3, see=see, frames="8", **asked)
    assert frames_of(shared) == frames_of(alone)
    assert numbers(shared) == pytest.approx(numbers(alone), abs=2e-5)
    assert shared["metadata"].get("embedding") == pytest.approx(alone["metadata"].get("embedding"), abs=1e-5)
    assert sorted(seen) == [shot["index"] for shot in alone["metadata"]["frames"] if "predictions" in shot]
    assert len(threads) > 1
    assert set(shared["metadata"]["timings_ms"]) == set(alone["metadata"]["timings_ms"])


def test_videos_and_pictures_at_once_are_answered_rightly(answer, clip):
    small = photo("astronaut").resize((256, 256))
    asked = [(clip, "4"), (encoded(small, "JPEG"), "1"), (encoded(small.rotate(5), "JPEG"), "1")]
    expected = [numbers(answer(data, 1, frames=count)) for data, count in asked]
    greenlets = [gevent.spawn(answer, data, 3, frames=count) for data, count in 3 * asked]
    gevent.joinall(greenlets, timeout=60)
    for i, greenlet in enumerate(greenlets):
        assert numbers(greenlet.get(block=False)) == pytest.approx(expected[i % 3], abs=2e-5)


def test_a_frame_that_fails_ends_the_others(answer, clip):
    def fail(index, _):
        if index > 10:
            raise ServiceError(400, "INVALID_VIDEO", "no")
        seen.append(index)
    seen, idle = [], video.decoders.idle.qsize()
    with pytest.raises(ServiceError, match="no"):
        answer(clip, 3, see=fail, frames="20")
    assert len(seen) <= 4
    assert video.decoders.idle.qsize() <= max(1, idle)  # the one at work has been ended
    answer(clip, 3, frames="2")


def test_a_deadline_ends_all_frames(answer):
    noise = np.random.default_rng(0).integers(0, 255, (720, 1280, 3), np.uint8)
    data = write([noise] * 4, codec="mjpeg", format="avi")
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        answer(data, 3, 0.5, frames="32", method="face")  # eight times as much as all frames that there are
    assert time.monotonic() - started < 5


def test_few_frames_are_in_memory_at_once(answer, clip, monkeypatch):
    alive, most = [], [0]
    frames = video.timed_frames

    def counted(*arguments):
        for frame in frames(*arguments):
            alive.append(weakref.ref(frame.image))
            most[0] = max(most[0], sum(image() is not None for image in alive))
            yield frame
            del frame

    def see(*_):
        time.sleep(0.02)
    monkeypatch.setattr(video, "timed_frames", counted)
    monkeypatch.setattr("app.tasks.videos.MOST_PIXELS", 2 * 360 * 300)
    answer(clip, 3, see=see, frames="12", method="middle")
    assert len(alive) == 12
    assert most[0] <= 2


def test_the_face_is_the_same_with_idle_slots():
    slots = Slots(3, 0, cores=3)
    for seed in (0, 3, 5, 6):
        image, deadline = collage(seed), Deadline(60)

        def search(image=image, deadline=deadline):
            return faces.largest_face(image, deadline, lambda calls: pieces.in_order(
                slots, calls, pieces.Ending(deadline), is_guess=True))
        assert slots.run(search, deadline, Stages()) == faces.largest_face(image)
    with pytest.raises(DeadlineExceeded, match="during face"):
        faces.largest_face(photo("coffee"), Deadline(0), lambda calls: pieces.in_order(
            slots, calls, pieces.Ending(Deadline(0)), is_guess=True))


def test_pictures_use_idle_slots_too(answer, monkeypatch):
    slots, searched = set(), faces.Search.windows
    monkeypatch.setattr(faces.Search, "windows", lambda *a: slots.add(threading.current_thread().name) or searched(*a))
    data = encoded(photo("coffee").resize((900, 700)), "JPEG")
    time.sleep(0.25)  # until requests count as coming one at a time
    answer(data, 3)
    assert len(slots) > 1


def test_the_time_of_a_stage_is_that_in_which_any_frame_is_in_it():
    stages, meeting = Stages(), threading.Barrier(2)
    overlapping = Overlapping(stages)

    def work():
        with overlapping("face"):
            meeting.wait(10)
            time.sleep(0.1)
            meeting.wait(10)
    threads = [threading.Thread(target=work) for _ in range(2)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = 1000 * (time.perf_counter() - started)
    assert 99 < stages.timings_ms["face"] <= elapsed
