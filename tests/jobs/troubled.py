"""A model that does what its input says, for tests of jobs: kill, fail, hang, or wait for some seconds or for a file. A
process that it hangs in is replaced sooner than others: tests wait for that."""
import os
import signal
import time
from pathlib import Path

from app import model_loader
from app.tasks.own import InvalidInput, OwnTask


class Troubled(OwnTask):
    takes = "text"
    example = "wait 0"

    def load(self):
        model_loader.HUNG_AFTER_S = model_loader.SLOT_HUNG_AFTER_S = 2

    def decode(self, text, options):
        if text == "refuse":
            raise InvalidInput("must be an order, as told")
        return text

    def predict(self, batch):
        return [self.obey(*text.split()) for text in batch]

    def obey(self, order, about="0"):
        """about: seconds, or the path of a file."""
        if order == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif order == "fail":
            raise RuntimeError("as told")
        elif order == "hang":
            time.sleep(3600)
        elif order == "much":
            return "x" * int(float(about))
        elif order == "late":  # gives up as soon as its time is over
            while self.seconds_left() > 0:
                time.sleep(0.001)
            raise TimeoutError
        elif order == "until":
            Path(f"{about}.begun").touch()
            while not os.path.exists(about) and self.seconds_left() > 0:
                time.sleep(0.01)
            about = "0"
        until = time.monotonic() + float(about)
        while time.monotonic() < until and self.seconds_left() > 0:
            time.sleep(0.01)
        return {"order": order, "process": os.getpid()}
