"""Calls of the user's code: within a time, and with its failures in one line."""
import logging
import sysconfig
import threading
import traceback
from pathlib import Path

from app.config import StartError
from app.tasks import ModelError

TASKS = str(Path(__file__).parent)

log = logging.getLogger(__name__)


def within(seconds, call, what):
    """Make a call in a thread of its own. Raises ModelError, in one line, if it fails or takes longer."""
    errors = []

    def run():
        try:
            call()
        except BaseException as e:
            errors.append(e)
    thread = threading.Thread(target=run, name=what, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise ModelError(f"{what} did not end within {seconds} s")
    if errors:
        if isinstance(errors[0], StartError):
            raise errors[0]
        log.debug("%s failed", what, exc_info=errors[0])
        raise ModelError(f"{what} failed: {one_line(errors[0])}") from errors[0]


def one_line(e):
    """An exception, and where in its own code it was raised."""
    frames = [frame for frame in traceback.extract_tb(e.__traceback__) if "importlib" not in frame.filename]
    installed = ("site-packages", sysconfig.get_path("stdlib"))
    where = [frame for frame in frames if not any(path in frame.filename for path in installed)
             and not frame.filename.startswith(TASKS)]
    place = f" ({Path(where[-1].filename).name}, line {where[-1].lineno})" if where else ""
    text = str(e).strip().partition("\n")[0]
    return f"{type(e).__name__}{': ' + text if text else ''}"[:400] + place
