"""Run a command, and say at its end what it has cost: time, and processor time of all processes that it started.

    python tests/cost.py BUDGET COMMAND…

Warns where the processor time is above BUDGET seconds. What else the machine does hardly changes it, unlike the time.
"""
import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import time

PR_SET_CHILD_SUBREAPER = 36


def main():
    budget_s, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":  # processes whose parent has ended become this one's: their time counts, too
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    started = time.monotonic()
    process = subprocess.Popen(command)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the command, which says what it has done so far
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while process.returncode is None:
        pid, status = os.wait()
        if pid == process.pid:
            process.returncode = os.waitstatus_to_exitcode(status)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    used_s = used.ru_utime + used.ru_stime
    print(f"{time.monotonic() - started:.0f} s, {used_s:.0f} s of processor time; the budget is {budget_s} s")
    if used_s > budget_s:
        print("warning: the tests take more than their budget: docs/development.md says where their time goes",
              file=sys.stderr)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


if __name__ == "__main__":
    sys.exit(main())
