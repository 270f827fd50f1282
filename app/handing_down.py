"""The settings of one process for others: the master's for its workers and for `python -m app prepare`; and the
descriptor for their logs."""
import contextlib
import os

from app.config import HANDED_DOWN, SETTINGS

LOG_DESCRIPTOR = "LOG_DESCRIPTOR"  # "descriptor:device:inode", see server/stderr_lines.py


def variables(settings):
    """The mapping from which Settings.parse makes the same in another process, which then reads no `.env`."""
    texts = {field.name.upper(): getattr(settings, field.name) for field in SETTINGS}
    if settings.optional:
        from app import optional_settings
        texts |= {field.name.upper(): getattr(settings.optional, field.name) for field in optional_settings.SETTINGS}
    return {name: "" if value is None else ",".join(value) if isinstance(value, tuple) else str(value)
            for name, value in texts.items()} | dict(settings.of_models) | {HANDED_DOWN: "1"}


def log_descriptors():
    """[the descriptor for logs that this process was given, or gives to others], which pass_fds takes; [] if none."""
    with contextlib.suppress(ValueError, OSError):
        descriptor, device, inode = map(int, os.environ.get(LOG_DESCRIPTOR, "").split(":"))
        about = os.fstat(descriptor)
        if (about.st_dev, about.st_ino) == (device, inode):  # not another one with its number
            return [descriptor]
    return []
