import pytest

from app import sizes


@pytest.mark.parametrize(("size", "words"), [
    (0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1000, "1 kB"), (12_345, "12.3 kB"), (999_949, "999.9 kB"),
    (10 * 2**20, "10.5 MB"), (5 * 10**9, "5 GB")])
def test_words(size, words):
    assert sizes.words(size) == words


def test_a_size_beyond_its_limit():
    assert sizes.too_many(12_300_000, 10 * 2**20, "MAX_FILE_SIZE") == "12.3 MB; the limit is 10.5 MB (MAX_FILE_SIZE)"
    assert sizes.too_many(10 * 2**20 + 1, 10 * 2**20) == "10,485,761 bytes; the limit is 10,485,760 bytes"
