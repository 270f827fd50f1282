"""Files that are complete or not there at all."""
import contextlib
import errno
import os
import secrets

from app.config import StartError


@contextlib.contextmanager
def replacing(path, only_try=False):
    """A temporary path beside `path`, which takes its place at the end of the block, unless it was only a try. Raises
    StartError if it cannot be written."""
    temporary = None
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        name = path.with_name(f".{path.name[:40]}-{secrets.token_hex(8)}{path.suffix[:20]}")
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # less the umask
        temporary = name
        yield temporary
        if not only_try:
            os.replace(temporary, path)
    except OSError as e:
        raise StartError(f"{path} cannot be written: {e.strerror or e}") from e
    finally:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
