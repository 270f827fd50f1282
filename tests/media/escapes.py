"""The video decoder up to the first byte of an upload; then, instead of decoding, it tries what a hostile file would.

Run like video_decoder.py, with the function of the sandbox to leave out ("" for none), a file and a TCP port on which
somebody listens. Writes one line of JSON, {attempt: "done" or the error}.
"""
import contextlib
import ctypes
import errno
import mmap
import os
import platform
import resource
import socket
import sys
import threading
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "app" / "media"))
import sandbox
import video_decoder

libc = ctypes.CDLL(None, use_errno=True)


def native(numbers, *arguments):
    """A system call by its number on x86_64 and on aarch64."""
    number = numbers[platform.machine() == "aarch64"]
    if libc.syscall(number, *arguments) == -1:
        raise OSError(ctypes.get_errno(), "")


def fork():
    if os.fork() == 0:
        os._exit(0)


def start_thread():
    thread = threading.Thread(target=print)
    thread.start()
    thread.join()


ATTEMPTS = {
    "read a file": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "list a folder": lambda: os.listdir("/tmp"),
    "write a file": lambda: os.open(f"/tmp/escaped-{os.getpid()}", os.O_WRONLY | os.O_CREAT),
    "remove a file": lambda: os.unlink(sys.argv[2]),
    "read the service's environment": lambda: os.open(f"/proc/{os.getppid()}/environ", os.O_RDONLY),
    "TCP": lambda: socket.socket().connect(("127.0.0.1", int(sys.argv[3]))),
    "UDP": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    "Unix socket": lambda: socket.socketpair(),
    "run a program": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "fork": fork,
    "signal the service": lambda: os.kill(os.getppid(), 0),
    "trace the service": lambda: native((101, 117), 0x4206, os.getppid(), 0, 0),
    "read the service's memory": lambda: native((310, 270), os.getppid(), 0, 0, 0, 0, 0),
    "file in memory": lambda: os.memfd_create("x"),
    "io_uring": lambda: native((425, 425), 1, 0),
    "clone3": lambda: native((435, 435), 0, 0),
    "x32": lambda: native((0x40000000 + 39, 9999)),  # calls of another architecture that the kernel may speak
    "code in memory": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC),
    "more memory": lambda: resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2),
    "the service's limits": lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CPU),
    "thread": start_thread,
    "become a program": lambda: os.execv("/bin/true", ["true"]),  # the last, since it ends this one
}


def outcome(attempt):
    try:
        attempt()
    except OSError as e:
        return errno.errorcode.get(e.errno, str(e))
    except (RuntimeError, ValueError) as e:
        return str(e)
    return "done"


def serve(source, sink, sandboxed):
    for number in (0, 1, 2):  # makes room below the limit of descriptors
        with contextlib.suppress(OSError):
            os.close(number)
    video_decoder.send(sink, {"sandboxed": sandboxed, **{name: outcome(attempt) for name, attempt in ATTEMPTS.items()}})


if __name__ == "__main__":
    if sys.argv[1]:
        setattr(sandbox, sys.argv[1], lambda: False)
    video_decoder.serve = serve
    video_decoder.main()
