"""How far preparing a network of lower precision has come, for people to see, and when its time is up."""
import logging
import math
import os
import sys
import time

from tqdm import tqdm

log = logging.getLogger(__name__)


class OutOfTime(Exception):
    """The processor time is used up."""


class Progress:
    """A bar on a terminal, else a log line per step. Called with (a sentence, done, total).

    end: of time.process_time(), from which calls raise OutOfTime; stopped: the step that was cut short last, or None.
    """

    def __init__(self, end=math.inf):
        self.step, self.bar, self.end, self.stopped = None, None, end, None

    def __call__(self, step, done, total):
        if step != self.step:
            self.close()
            self.step = step
            if sys.stderr.isatty():
                columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80  # with 0, tqdm would draw nothing
                self.bar = tqdm(total=total, desc=step, leave=False, ncols=columns, nrows=20)
            else:
                log.info("%s", step)
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
        if time.process_time() > self.end:
            self.stopped = step
            raise OutOfTime

    def close(self):
        if self.bar is not None:
            self.bar.close()
        self.bar = None
