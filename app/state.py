"""What the processes of one running service share: a folder in memory, made by the Gunicorn master before it forks."""
import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

from app.prepare import Prepared

PREFIX = "model-server-"
folder = None  # set in the master by create(), inherited by the workers; None without Gunicorn
lock = None  # held by the master as long as it lives, whatever process ids it and others have in their containers


def create():
    """Make the folder, and remove those that masters killed without warning left behind."""
    global folder, lock
    for _, left in all_folders():
        if not is_in_use(left):
            shutil.rmtree(left, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=root()))
    lock = open(made / "lock", "w")  # noqa: SIM115 - open until the master ends
    fcntl.flock(lock, fcntl.LOCK_EX)
    folder = made.rename(root() / f"{PREFIX}{os.getpid()}-{made.name[len(PREFIX) + 1:]}")  # visible once it is locked


def is_in_use(path):
    """Whether the master of a folder lives."""
    try:
        with open(path / "lock") as held:
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def root():
    return Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir())


def all_folders():
    """(process id of the master, folder) of every service, those that are gone too."""
    for path in root().glob(f"{PREFIX}*"):
        pid = path.name[len(PREFIX):].partition("-")[0]
        if pid.isdigit():
            yield int(pid), path


def services():
    """{process id of the master: folder} of the services that run."""
    return {pid: path for pid, path in all_folders() if is_in_use(path)}


def remove():
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


def draining():
    """Whether the service was told to stop and only waits for load balancers to notice."""
    return folder is not None and (folder / "draining").exists()


def set_draining():
    with contextlib.suppress(FileNotFoundError):  # somebody cleaned up in /dev/shm: stopping must work all the same
        (folder / "draining").touch()


def set_given_up():
    """Note that a reload's last worker did not get ready, for the master's next SIGTTOU."""
    (folder / "given-up").touch()


def take_given_up():
    """Whether set_given_up() was called since the last time."""
    try:
        (folder / "given-up").unlink()
    except FileNotFoundError:
        return False
    return True


def set_ready(pid):
    """Note that a worker has its model."""
    (folder / f"ready-{pid}").touch()


def set_gone(pid):
    (folder / f"ready-{pid}").unlink(missing_ok=True)


def ready_workers(in_folder=None):
    """Process ids of the workers that have their model."""
    return {int(path.name.partition("-")[2]) for path in (in_folder or folder).glob("ready-*")}


def publish(prepared):
    """Say which bundle workers load from now on."""
    write_json("served.json", {**asdict(prepared), "folder": str(prepared.folder.resolve())})


def write_json(name, content):
    part = folder / f"{name}.part"
    part.write_text(json.dumps(content))
    part.replace(folder / name)


def read_json(path):
    return json.loads(path.read_text())


def served():
    """The Prepared that was published last; None outside a service."""
    if folder is None:
        return None
    fields = read_json(folder / "served.json")
    return Prepared(**{**fields, "folder": Path(fields["folder"])})
