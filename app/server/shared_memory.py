"""The memory that a service's processes share: first the Board, then a region of counters for each process.

The Gunicorn master creates it before it forks. On Linux it is a memfd: it has no name in any file system, so that
nothing is left behind and nothing can be removed while the service runs, and `python -m app reload` opens it through
/proc.
"""
import glob
import mmap
import os

from app.config import StartError
from app.server import board, counters
from app.server.publishing import WritableBoard

NAME = "model-server"
MAGIC = 0x6D6F64656C763032


def create(workers):
    """In the master: create the memory for this many workers, and count in its first region."""
    size = board.BYTES + (1 + workers) * counters.REGION_BYTES
    try:
        descriptor = os.memfd_create(NAME)
        os.ftruncate(descriptor, size)
        memory = memoryview(mmap.mmap(descriptor, size))
    except (AttributeError, OSError):  # not Linux, or forbidden: `reload` then works by signal only
        descriptor, memory = None, memoryview(mmap.mmap(-1, size))
    board.own = WritableBoard(memory, descriptor)
    board.own.integers[board.MASTER_AT], board.own.integers[board.MAGIC_AT] = os.getpid(), MAGIC
    counters.regions = regions_in(memory)
    counters.own = counters.regions[0]
    counters.own.claim()


def regions_in(memory):
    """The counters.Regions, the master's first."""
    return [counters.Region(memory[at:at + counters.REGION_BYTES])
            for at in range(board.BYTES, len(memory), counters.REGION_BYTES)]


def free_region(taken):
    """The number of a worker's region that is not in `taken`; None if there is none left."""
    return min(set(range(1, len(counters.regions))) - set(taken), default=None)


def end_worker(number):
    """In the master, when a worker has ended: drop its gauges, keep its counters."""
    if number is not None:
        counters.regions[number].release()
    counters.count("worker_exits")


# --- for commands ---

def services():
    """{process ID of the master: (WritableBoard, the workers' Regions)} of the services on this machine whose memory
    this user may open. Empty except on Linux."""
    found = {}
    for link in glob.iglob("/proc/[0-9]*/fd/*"):  # unlike Path.glob, it minds no process that ends
        try:
            if not os.readlink(link).startswith(f"/memfd:{NAME}"):
                continue
            descriptor = os.open(link, os.O_RDWR)
        except OSError:  # another user's, or gone meanwhile
            continue
        memory = memoryview(mmap.mmap(descriptor, 0))
        its_board, pid = WritableBoard(memory, descriptor), int(link.split("/")[2])
        state = its_board.integers[board.MAGIC_AT], its_board.integers[board.MASTER_AT]
        if state == (MAGIC, pid) and pid not in found:
            found[pid] = its_board, regions_in(memory)[1:]
        else:  # a worker's view of the same memory, or the master's second one
            os.close(descriptor)
    return found


def running_service(pid=None, port=None):
    """(master's process ID, its WritableBoard, its workers' Regions) of the service on this machine, chosen by pid or
    port if there are several. Raises StartError."""
    running = services()
    found = [master for master, (its_board, _) in running.items()
             if pid in (None, master) and port in (None, port_of(its_board))]
    if len(found) != 1:
        lines = sorted(f"  --port {port_of(its_board) or '-':<5}  --pid {master:<7}  {models_of(its_board)}"
                       for master, (its_board, _) in running.items())
        if not lines:
            raise StartError("no running service was found")
        wanted = f"with {f'port {port}' if pid is None else f'process ID {pid}'} " if not found else ""
        raise StartError("\n".join([f"no running service {wanted}was found, only:" if not found else
                                    f"{len(found)} services run here: choose one with --port or --pid", *lines]))
    return found[0], *running[found[0]]


def port_of(its_board):
    """The TCP port of a service, if it has one."""
    return its_board.read().get("port")


def models_of(its_board):
    """The models that a service has published, for people."""
    return ", ".join(model["key"] for model in (its_board.published() or {"models": []})["models"])
