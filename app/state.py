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
    root = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir())
    for left in root.glob(f"{PREFIX}*"):
        pid = left.name[len(PREFIX):].partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=root))


def remove():
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


def publish(prepared):
    """Say which bundle workers load from now on."""
    part = folder / "served.json.part"
    part.write_text(json.dumps({**asdict(prepared), "folder": str(prepared.folder.resolve())}))
    part.replace(folder / "served.json")


def served():
    """The Prepared that was published last; None outside a service."""
    if folder is None:
        return None
    fields = json.loads((folder / "served.json").read_text())
    return Prepared(**{**fields, "folder": Path(fields["folder"])})
