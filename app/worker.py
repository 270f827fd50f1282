"""Gunicorn's threaded worker, with the few things that a model server needs beside it."""
import sys

from gunicorn.arbiter import Arbiter
from gunicorn.workers.gthread import ThreadWorker

from app.config import StartError


class Worker(ThreadWorker):
    def load_wsgi(self):
        try:
            super().load_wsgi()
        except StartError as e:
            self.log.critical("this worker cannot serve: %s", e)
            sys.exit(Arbiter.WORKER_BOOT_ERROR)
