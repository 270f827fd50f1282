"""The face is the largest of those that OpenCV finds when it looks for all of them; its crop is worked out by hand."""
import threading
import time

import numpy as np
import pytest
from conftest import photo
from opencv_faces import all_faces, collage
from PIL import Image

from app.errors import Deadline, DeadlineExceeded
from app.media import faces


def test_the_largest_face_is_that_of_the_whole_search():
    outcomes = set()
    for seed in range(16):
        image = collage(seed)
        expected = max(all_faces(image), key=lambda box: box[2] * box[3], default=None)
        assert faces.largest_face(image) == expected, seed
        outcomes.add(expected is None)
    assert outcomes == {True, False}


@pytest.fixture
def searches(monkeypatch):
    """[(smallest size, largest size, place)] of all searches so far."""
    found, windows = [], faces.Search.windows

    def search(self, *sizes_and_place):
        found.append((*sizes_and_place, None)[:3])
        return windows(self, *sizes_and_place)
    monkeypatch.setattr(faces.Search, "windows", search)
    return found


def test_a_large_face_ends_the_search_early(searches):
    image = photo("astronaut").crop((100, 0, 350, 250)).resize((900, 900))
    assert faces.largest_face(image) == max(all_faces(image), key=lambda box: box[2] * box[3])
    assert min(smallest for smallest, _, _ in searches) > 100


def test_once_there_is_a_face_only_its_surroundings_are_searched(searches):
    image = photo("astronaut")
    assert faces.largest_face(image) == max(all_faces(image), key=lambda box: box[2] * box[3])
    narrowed = [place for *_, place in searches if place]
    assert narrowed
    assert all(rows.mean() < 0.5 and last < image.width for rows, last in narrowed)


def test_places_that_turn_out_to_be_too_small_are_searched_again(searches, monkeypatch):
    monkeypatch.setattr(faces.Search, "place_for", lambda self, largest: self.decisive is not None and (
        np.zeros(self.grey.shape[0], bool), 0))
    for seed in (1, 3, 5):
        image = collage(seed)
        assert faces.largest_face(image) == max(all_faces(image), key=lambda box: box[2] * box[3], default=None)
    sizes = [(smallest, largest) for smallest, largest, _ in searches]
    assert len(sizes) > len(set(sizes))


@pytest.mark.parametrize("x", [12, 18, 42, 66, 114, 132])
def test_faces_that_are_cut_at_the_edge(x):
    """OpenCV cuts windows at the edge before it gives them out, but groups them before it cuts them."""
    image = photo("astronaut").resize((640, 640)).crop((x, 0, x + 360, 200))
    assert faces.largest_face(image) == max(all_faces(image), key=lambda box: box[2] * box[3])


@pytest.mark.parametrize("side", [40, 55, 59, 60, 61, 62, 63, 75, 90, 130, 300])
def test_small_pictures_too(side):
    image = photo("astronaut").crop((150, 40, 300, 190)).resize((side, side))
    assert faces.largest_face(image) == max(all_faces(image), key=lambda box: box[2] * box[3], default=None)


@pytest.mark.parametrize(("face", "size", "box"), [
    ([100, 100, 100, 100], (512, 512), [82, 82, 135, 135]),   # side 135 around (150, 150): from 82.5
    ([100, 100, 101, 103], (512, 512), [81, 82, 139, 139]),   # side int(139.05), from 81.0 and 82.0
    ([0, 10, 100, 100], (512, 512), [0, 0, 135, 135]),        # -17.5 and -7.5 become 0, the side stays
    ([400, 400, 100, 100], (480, 490), [382, 382, 98, 108]),  # cut at the right and below
    ([5, 5, 60, 60], (64, 64), [0, 0, 64, 64]),               # 81 wide, cut on both sides
])
def test_crop_worked_out_by_hand(face, size, box):
    assert faces.crop_box(face, size) == box


def test_methods():
    astronaut, coffee = photo("astronaut"), photo("coffee")
    for method in ("face", "face+middle"):
        assert faces.find_crop(astronaut, method) == faces.crop_box(faces.largest_face(astronaut), (512, 512))
        assert faces.find_crop(coffee, method) is None
    assert faces.find_crop(astronaut, "middle") is None


def test_the_search_ends_at_its_deadline():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (3000, 4000, 3), np.uint8))  # takes seconds
    started = time.thread_time()
    with pytest.raises(DeadlineExceeded, match="during face"):
        faces.find_crop(noise, "face", Deadline(0.3))
    assert time.thread_time() - started < 3
    assert faces.find_crop(noise, "middle", Deadline(0)) is None


def test_tiny_pictures_have_no_face():
    for size in ((1, 1), (59, 59), (3, 500), (60, 60)):
        assert faces.largest_face(Image.new("RGB", size)) is None


def test_every_thread_has_a_detector_of_its_own():
    seen, kept, results = [], [], []

    def work():
        own = faces.detector()
        results.append(faces.largest_face(photo("astronaut")))
        kept.append(faces.detector() is own)
        seen.append(own)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(detector) for detector in [*seen, faces.detector()]}) == 5
    assert kept == [True] * 4
    assert results == [faces.largest_face(photo("astronaut"))] * 4


def test_long_pictures_leave_the_detector_as_it_was():
    """OpenCV's keeps buffers as wide as the widest and as high as the highest picture it has seen."""
    face = photo("astronaut")
    before = faces.largest_face(face)
    for size in [(400_000, 60), (60, 400_000), (20_000, 100), (100, 20_000)]:
        assert faces.largest_face(Image.new("RGB", size, "white")) is None
    assert faces.largest_face(face) == before
