"""Files that are complete or not there at all."""
import contextlib
import os
import tempfile
from pathlib import Path

from app.config import StartError


@contextlib.contextmanager
def replacing(path, only_try=False):
    """A temporary path beside `path`, which takes its place at the end of the block, unless it was only a try. Raises
    StartError if it cannot be written."""
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name[:60]}-", suffix=path.suffix, dir=path.parent)
        os.close(descriptor)
        yield Path(temporary)
        if not only_try:
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
    except OSError as e:
        raise StartError(f"{path} cannot be written: {e.strerror or e}") from e
    finally:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
