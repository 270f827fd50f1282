"""How a model is prepared beside a running service: so that the service's answers hardly wait for it."""
import contextlib
import os

NICE = 10  # at 19, a saturated service would leave it next to nothing


def give_way(cores):
    """Let this process and its threads, before it has others, give way to other processes. cores: how many the service
    may use, of which half are used here."""
    os.nice(NICE)
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or forbidden
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-max(1, cores // 2):])
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
