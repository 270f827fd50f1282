"""Where jobs keep what they work on: a folder, or a bucket in S3. All functions block and raise OSError; keys are made
by the service, such as JOB_ID/0."""
import contextlib
import errno
import os
import re
import secrets
import shutil
import time
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from app.config import StartError

SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}")


def Storage(url, is_traced=False):
    """The storage behind STORAGE_URL: a folder's absolute path, or s3://bucket/prefix."""
    return Bucket(url, is_traced) if url.startswith("s3://") else Folder(url)


class Own:
    """What belongs to the services of one database in a storage that they may share with others: all keys are in a
    folder of its name. So whatever is swept up there is theirs."""

    def __init__(self, database, optional):
        self.storage, self.database = Storage(optional.storage, optional.tracing), database

    def inside(self, key):
        try:
            return f"jobs-{self.database.name()}/{key}"
        except (SQLAlchemyError, StartError) as e:
            raise OSError(f"{type(e).__name__}: {e}".splitlines()[0]) from e

    def put(self, key, data):
        self.storage.put(self.inside(key), data)

    def get(self, key, most_bytes):
        try:
            return self.storage.get(self.inside(key), most_bytes)
        except FileNotFoundError:  # of a job that a version without such folders has accepted
            return self.storage.get(key, most_bytes)

    def delete_all(self, prefix):
        for key in (self.inside(prefix), prefix):  # the latter as in get
            self.storage.delete_all(key)

    def prefixes(self, older_than_s):
        return self.storage.prefixes(self.inside("")[:-1], older_than_s)


def checked(key):
    """Raises ValueError for a key that could lead elsewhere."""
    if not all(map(SEGMENT.fullmatch, key.split("/"))):
        raise ValueError(f"no key of the storage: {key!r}")
    return key


class Folder:
    """What is stored is on the disk when `put` returns, and whole: other processes see a file or none."""

    def __init__(self, path):
        self.path = Path(path)

    def put(self, key, data):
        path = self.path / checked(key)
        make(path.parent)
        part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        sync(path.parent)

    def get(self, key, most_bytes):
        """The bytes under a key. Raises FileNotFoundError; OSError (EFBIG) if they are more than most_bytes."""
        with open(self.path / checked(key), "rb") as file:
            if os.fstat(file.fileno()).st_size > most_bytes:
                raise OSError(errno.EFBIG, f"{key} has more than {most_bytes} bytes")
            return file.read(most_bytes)

    def delete_all(self, prefix):
        """Delete the key and all keys below it, if there are any."""
        path = self.path / checked(prefix)
        with contextlib.suppress(FileNotFoundError):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def prefixes(self, folder, older_than_s):
        """The next parts of all keys in a folder that nothing was added to for so many seconds."""
        path, before, found = self.path / checked(folder), time.time() - older_than_s, []
        if not path.is_dir():
            return found
        for entry in os.scandir(path):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                if SEGMENT.fullmatch(entry.name) and entry.stat(follow_symlinks=False).st_mtime < before:
                    found.append(entry.name)
        return found


def make(folder):
    if not folder.is_dir():
        make(folder.parent)
        folder.mkdir(0o700, exist_ok=True)
        sync(folder.parent)


def sync(folder):
    """Put a folder's entries on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Bucket:
    """The same in S3."""

    def __init__(self, url, is_traced):
        from app.outbound.event_loop import run
        from app.outbound.http import TooLarge
        from app.outbound.s3 import S3
        self.bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self.prefix = f"{prefix.rstrip('/')}/" if prefix else ""
        self.s3, self.run, self.too_large = S3(is_traced), run, TooLarge

    def put(self, key, data):
        self.run(self.s3.put(self.bucket, self.prefix + checked(key), data))

    def get(self, key, most_bytes):
        try:
            return self.run(self.s3.get(self.bucket, self.prefix + checked(key), most_bytes))
        except self.too_large as e:
            raise OSError(errno.EFBIG, f"{key} has more than {most_bytes} bytes") from e

    def delete_all(self, prefix):
        found = self.run(self.s3.listed(self.bucket, self.prefix + checked(prefix)))
        ours = (self.prefix + prefix, self.prefix + prefix + "/")
        self.run(self.s3.delete(self.bucket, [key for key, _ in found if key == ours[0] or key.startswith(ours[1])]))

    def prefixes(self, folder, older_than_s):
        newest, start = {}, f"{self.prefix}{checked(folder)}/"
        for key, changed in self.run(self.s3.listed(self.bucket, start)):
            first = key.removeprefix(start).partition("/")[0]
            newest[first] = max(changed, newest.get(first, changed))
        return [first for first, changed in newest.items() if changed < time.time() - older_than_s]
