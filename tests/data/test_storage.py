"""The storage of jobs: the same behaviour in a folder and in S3."""
import os
import stat
import threading
import time

import pytest
from s3_server import S3

from app.config import Settings
from app.data.database import Database
from app.data.storage import Own, Storage
from app.outbound.s3 import S3 as S3Client


@pytest.fixture(scope="module")
def in_bucket(s3_server):
    """in_bucket(prefix): a Storage in a bucket of its own. All have one connection, as making one takes a while."""
    s3 = S3Client()

    def storage(prefix=""):
        one = Storage(f"s3://{s3_server.bucket()}{prefix}")
        one.s3 = s3
        return one
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.variables.items():
            patch.setenv(name, value)
        yield storage


@pytest.fixture(params=["folder", "s3"])
def storage(request, tmp_path):
    if request.param == "folder":
        return Storage(str(tmp_path / "not" / "there" / "yet"))
    return request.getfixturevalue("in_bucket")("/some/prefix")


def test_what_is_put_is_got(storage):
    contents = {"a1/0": b"first", "a1/option-voice": b"", "a1/1": bytes(range(256)) * 4000}
    for key, data in contents.items():
        storage.put(key, data)
    assert {key: storage.get(key, len(data)) for key, data in contents.items()} == contents
    storage.put("a1/0", b"again")
    assert storage.get("a1/0", 5) == b"again"


def test_more_than_expected_is_an_error(storage):
    storage.put("a1/0", b"12345")
    with pytest.raises(OSError, match="a1/0 has more than 4 bytes"):
        storage.get("a1/0", 4)


def test_what_is_missing_is_an_error(storage):
    with pytest.raises(FileNotFoundError):
        storage.get("a1/0", 4)


def test_a_job_is_deleted_with_all_that_is_its_own_and_nothing_else(storage):
    for key in ("a1/0", "a1/1", "a1/option-x", "a10/0", "a2/0"):
        storage.put(key, b"x")
    storage.delete_all("a1")
    storage.delete_all("a1")
    storage.delete_all("never-there")
    for key in ("a1/0", "a1/1", "a1/option-x"):
        with pytest.raises(FileNotFoundError):
            storage.get(key, 1)
    assert storage.get("a10/0", 1) == storage.get("a2/0", 1) == b"x"
    storage.delete_all("a2/0")
    with pytest.raises(FileNotFoundError):
        storage.get("a2/0", 1)


def test_leftovers_are_found_by_their_age(storage):
    assert storage.prefixes("a", -10) == []
    storage.put("a/1/0", b"x")
    storage.put("a/1/1", b"x")
    storage.put("a/2/0", b"x")
    storage.put("b/3/0", b"x")
    assert sorted(storage.prefixes("a", -10)) == ["1", "2"]
    assert storage.prefixes("a", 60) == []


class Named:
    """As a Database."""

    def __init__(self, name):
        self.name = lambda: name


def test_several_databases_services_share_a_storage(storage):
    optional = Settings.parse({"JOBS": "on"}).optional
    one, other = Own(Named("one"), optional), Own(Named("other"), optional)
    one.storage = other.storage = storage
    storage.put("0" * 32 + "/0", b"foreign")
    one.put("job/0", b"1")
    other.put("job/0", b"2")
    assert (one.get("job/0", 1), other.get("job/0", 1)) == (b"1", b"2")
    assert one.prefixes(-10) == ["job"]
    one.delete_all("job")
    assert (one.prefixes(-10), other.prefixes(-10)) == ([], ["job"])
    with pytest.raises(FileNotFoundError):
        one.get("job/0", 1)
    assert other.get("job/0", 1) == b"2"
    assert one.get("0" * 32 + "/0", 7) == b"foreign"  # as earlier versions kept their own
    one.delete_all("0" * 32)  # which it does with jobs of its own alone
    with pytest.raises(FileNotFoundError):
        storage.get("0" * 32 + "/0", 7)


def test_without_the_database_the_storage_is_away_too(tmp_path):
    database = Database("postgresql+psycopg://nobody@127.0.0.1:1/none")
    own = Own(database, Settings.parse({"JOBS": "on", "STORAGE_URL": str(tmp_path)}).optional)
    with pytest.raises(OSError, match="OperationalError"):
        own.put("job/0", b"1")
    database.close()


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a//x", "a/.", "a/..", ".a/x", "a/x\0", "a\\x",
                                 "a/x y", "a/x\n", "a/é", "a/" + 129 * "x"])
def test_no_key_leads_elsewhere(storage, key):
    for call in (lambda: storage.put(key, b"x"), lambda: storage.get(key, 1), lambda: storage.delete_all(key)):
        with pytest.raises(ValueError, match="no key of the storage"):
            call()


def test_several_threads_at_once(storage):
    def work(number):
        storage.put(f"a{number}/0", bytes([number]))
        found[number] = storage.get(f"a{number}/0", 1)
    found = {}
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == {number: bytes([number]) for number in range(8)}


# --- folders ---

def test_files_are_their_owners_alone_and_nothing_unfinished_stays(tmp_path):
    Storage(str(tmp_path / "storage")).put("a1/0", b"x")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "storage").rglob("*")}
    assert modes == {"a1": 0o700, "0": 0o600}
    assert stat.S_IMODE((tmp_path / "storage").stat().st_mode) == 0o700


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    storage, seen, sync = Storage(str(tmp_path)), [], os.fsync
    storage.put("a1/0", b"before")

    def watch(descriptor):
        seen.append(storage.get("a1/0", 10))
        sync(descriptor)
    monkeypatch.setattr(os, "fsync", watch)
    storage.put("a1/0", b"after")
    assert seen == [b"before", b"after"]  # written to the disk before it has its name, and then its name

    def fail(descriptor):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        storage.put("a1/0", b"too much")
    assert storage.get("a1/0", 10) == b"after"
    assert [path.name for path in (tmp_path / "a1").iterdir()] == ["0"]


def test_a_link_in_the_storage_is_not_followed_when_it_is_deleted(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "kept").write_text("x")
    storage = Storage(str(tmp_path / "storage"))
    storage.put("a1/0", b"x")
    (tmp_path / "storage" / "a1" / "link").symlink_to(tmp_path / "other")
    storage.delete_all("a1")
    assert (tmp_path / "other" / "kept").exists()


def test_old_folders_are_leftovers(tmp_path):
    storage = Storage(str(tmp_path))
    storage.put("a/1/0", b"x")
    storage.put("a/2/0", b"x")
    os.utime(tmp_path / "a/1", (time.time() - 100,) * 2)
    assert storage.prefixes("a", 60) == ["1"]


# --- S3 ---

def test_a_server_that_is_away_or_refuses_is_an_os_error(tmp_path, monkeypatch):
    server = S3(tmp_path).start()
    try:
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        storage = Storage(f"s3://{server.bucket()}")
        storage.put("a1/0", b"x")
        with pytest.raises(OSError, match="bucket"):
            Storage("s3://no-such-bucket").put("a1/0", b"x")
    finally:
        server.kill()
    for call in (lambda: storage.put("a1/0", b"x"), lambda: storage.get("a1/0", 1), lambda: storage.prefixes("a", 0),
                 lambda: storage.delete_all("a1")):
        with pytest.raises(OSError, match="Could not connect"):
            call()


def test_more_objects_than_one_answer_lists(in_bucket, monkeypatch):
    """In a whole bucket."""
    monkeypatch.setattr("app.outbound.s3.MOST_DELETED", 3)
    storage, pages = in_bucket(), []
    call = storage.s3.call

    async def in_small_pages(method, **arguments):
        pages.append(method)
        return await call(method, **arguments, **({"MaxKeys": 3} if method == "list_objects_v2" else {}))
    monkeypatch.setattr(storage.s3, "call", in_small_pages)
    for number in range(8):
        storage.put(f"a/{number % 2}/{number}", b"x")
    assert sorted(storage.prefixes("a", -10)) == ["0", "1"]
    storage.delete_all("a/1")
    storage.delete_all("a/0")
    assert storage.prefixes("a", -10) == []
    assert pages.count("delete_objects") == 4
