"""What the processes of one running service share: a folder in memory, made by the Gunicorn master before it forks."""
import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

from app.prepare import Prepared

PREFIX = "model-server-"
folder = None  # set in the master by create(), inherited by the workers; None without Gunicorn


def create():
    """Make the folder, and remove those that masters killed without warning left behind."""
    global folder
    for pid, left in all_folders():
        if not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=root()))


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
    return {pid: path for pid, path in all_folders() if Path(f"/proc/{pid}").exists()}


def remove():
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


def draining():
    """Whether the service was told to stop and only waits for load balancers to notice."""
    return folder is not None and (folder / "draining").exists()


def set_draining():
    (folder / "draining").touch()


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
