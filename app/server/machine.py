"""Which processors the service may use on this machine, and how workers and their streams share them.

Reads files only: the Gunicorn master calls this, and must neither import torch nor touch CUDA.
"""
import importlib.util
import math
import os
import re
from pathlib import Path

from app import model_settings
from app.config import Plan, StartError

STREAMS_PER_WORKER = 8  # one process keeps this many cores busy before the GIL costs throughput
QUEUE = 16              # waiting requests per concurrent inference: on a CPU about 0.7 s of ResNet-50


def cpu_limit(root=Path("/sys/fs/cgroup"), membership=Path("/proc/self/cgroup")):
    """CPUs that the control groups of this process grant, e.g. 1.5, or None if none sets a limit.

    The smallest limit of its own group and those above it (a container's, systemd's CPUQuota), in cgroup v2 and v1.
    membership: lines of "hierarchy:controllers:/path"; cgroup v2 names no controllers.
    """
    try:
        text = membership.read_text(errors="replace")
    except OSError:
        text = ""
    folders = [root, root / "cpu"]  # in a container these may be its own group
    for controllers, path in re.findall(r"^\d+:([^:\n]*):/(.*)$", text, re.MULTILINE):
        if controllers == "":
            mounts = [root]
        elif "cpu" in controllers.split(","):
            mounts = [root / controllers, root / "cpu"]
        else:
            continue
        folders += [mount / group for mount in mounts for group in (Path(path), *Path(path).parents)]
    return min(filter(None, map(quota, folders)), default=None)


def quota(folder):
    """CPUs that one control group grants, None if it sets no limit."""
    try:
        if (folder / "cpu.max").exists():
            allowed, period = (folder / "cpu.max").read_text().split()
        else:
            allowed = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return int(allowed) / int(period) if int(allowed) > 0 and int(period) > 0 else None
    except (OSError, ValueError):  # not there; "max"
        return None


def usable_cores():
    """Whole cores that this process may keep busy, at least 1: affinity and cgroup limit, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = cpu_limit()
    return max(1, min(cores, math.ceil(limit))) if limit else cores


def planned_cores(settings):
    return min(usable_cores(), settings.cores or math.inf)


def cuda_devices():
    """Indices of the GPUs that an installed CUDA build of torch could use, found without initialising CUDA."""
    torch = importlib.util.find_spec("torch")
    if torch is None or not list(Path(torch.origin).parent.glob("lib/libtorch_cuda.so")):
        return []
    count = len([d for d in Path("/dev").glob("nvidia*") if d.name[6:].isdigit()])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        count = min(count, len([v for v in visible.split(",") if v.strip() and not v.strip().startswith("-")]))
    return list(range(count))


def plan(settings):
    """Work out the Plan from the settings and this machine. Raises StartError for a missing device, or for a PRECISION
    that it cannot have."""
    gpus = cuda_devices() if settings.device != "cpu" else []
    if settings.device.startswith("cuda"):
        if not gpus:
            raise StartError(f"DEVICE is {settings.device}, but there is no NVIDIA GPU with a CUDA build of torch")
        if ":" in settings.device:
            index = int(settings.device.partition(":")[2])
            if index not in gpus:
                raise StartError(f"DEVICE is {settings.device}, but this machine has cuda:0 to cuda:{gpus[-1]}")
            gpus = [index]
    if gpus and settings.engine == "openvino" and settings.device == "auto":
        gpus = []
    if gpus and settings.engine == "openvino":
        raise StartError("ENGINE=openvino runs on the CPU; use ENGINE=torch or auto with DEVICE=cuda")

    if gpus:
        engine, devices = "torch", tuple(f"cuda:{i}" for i in gpus)
        workers = settings.workers or len(gpus)
        streams, slots = 1, 2 * settings.max_batch_size
    else:
        cores = planned_cores(settings)
        engine, devices = settings.engine, ("cpu",)
        if engine == "auto":
            engine = "openvino" if importlib.util.find_spec("openvino") else "torch"
        workers = settings.workers or math.ceil(cores / STREAMS_PER_WORKER)
        # One single-threaded stream per core: two streams on two cores gave 56 images/s, one stream with two
        # threads 53 (ResNet-50, OpenVINO, fp32). Several workers round up: 2 × 2 streams on two cores cost 4 %.
        streams = max(1, math.ceil(cores / workers))
        # While the streams infer, further slots decode the next requests. With only as many slots as streams, streams
        # would idle, which costs 3 to 20 % of throughput (two cores, 500×375 to 4000×3000, fp32 and bf16). Twice as
        # many slots would gain another 1 to 4 %, but delay refusals under overload.
        slots = streams + max(1, streams // 2)
    for one in model_settings.each(settings).values():
        if ":" in one.model_name:  # what PRECISION means is up to it
            continue
        if one.precision == "fp16" and not gpus:
            raise StartError("PRECISION is fp16, which is for GPUs; a CPU takes fp32, bf16, int8 or auto")
        if one.precision == "int8" and engine != "openvino":
            raise StartError("PRECISION is int8, which needs ENGINE=openvino on a CPU")
    queue = settings.max_queue if settings.max_queue is not None else \
        QUEUE * (settings.max_batch_size if gpus else streams)
    return Plan(engine, devices, workers, streams, slots, queue)
