"""The broker, which carries the IDs of jobs to workers: Redis, or files in a folder. Celery does the work."""
import collections
import contextlib
import json
import os
import time

from celery import Celery
from kombu.exceptions import OperationalError
from kombu.transport import TRANSPORT_ALIASES
from redis import Redis, RedisError

QUEUES = ("short", "long")
TASK = "jobs.run"
PUBLISH_WITHIN_S = 2    # each step of it
POLL_S = 0.02           # how often a worker looks into the folder
PART_AFTER_S = 600      # after which nobody is still writing a message


class Broker:
    """celery: the Celery application, which has one task."""

    def __init__(self, optional, timeout_s=PUBLISH_WITHIN_S):
        self.folder = None if optional.jobs_broker else optional.data_dir / "queue"
        if self.folder:
            for path in (self.folder, self.folder / "control"):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            options = {"data_folder_in": str(self.folder), "data_folder_out": str(self.folder),
                       "control_folder": str(self.folder / "control"), "polling_interval": POLL_S}
            self.remove_damaged()
            TRANSPORT_ALIASES["filesystem"] = "app.jobs.folder:Transport"
        else:
            options = {"socket_timeout": timeout_s, "socket_connect_timeout": PUBLISH_WITHIN_S,
                       "socket_keepalive": True, "health_check_interval": 10}
            if timeout_s == PUBLISH_WITHIN_S:  # who publishes does not wait for a broker that is away
                options["max_retries"] = 0
            self.redis = Redis.from_url(optional.jobs_broker, socket_timeout=PUBLISH_WITHIN_S,
                                        socket_connect_timeout=PUBLISH_WITHIN_S)  # kombu's queues are lists in it
        self.celery = Celery("jobs", broker=optional.jobs_broker or "filesystem://localhost", set_as_current=False,
                             fixups=[])
        self.celery.conf.update(
            broker_transport_options=options, broker_connection_retry_on_startup=True,
            broker_connection_max_retries=None, task_serializer="json", accept_content=["json"],
            task_ignore_result=True, task_store_errors_even_if_ignored=False, task_default_queue=QUEUES[0],
            task_create_missing_queues=True, worker_enable_remote_control=False, worker_send_task_events=False,
            worker_hijack_root_logger=False, worker_redirect_stdouts=False)

    def publish(self, job_id, queue):
        """Send a job's ID. Raises OSError."""
        for is_last in (False, True):  # the first connection may be one of a broker that has restarted since
            try:
                return self.celery.send_task(TASK, (job_id,), queue=queue, retry=False, ignore_result=True)
            except (OperationalError, ValueError) as e:  # ValueError: a file of the folder that is damaged
                self.remove_damaged()
                if is_last:
                    raise ConnectionError(f"the broker is away: {e}") from e

    def remove_damaged(self):
        """Remove messages that a killed process left in part, and the files that say which queues there are, if they
        were not written to their end; kombu writes them anew."""
        for path in self.folder.glob("*.part") if self.folder else ():
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < time.time() - PART_AFTER_S:
                    path.unlink()
        for path in (self.folder / "control").glob("*.exchange") if self.folder else ():
            with contextlib.suppress(OSError):
                try:
                    json.loads(path.read_bytes())
                except ValueError:
                    path.unlink()

    def waiting(self):
        """{queue: number of messages in it}. Raises OSError."""
        if self.folder:
            found = collections.Counter(name.rpartition(".")[0].rpartition(".")[2] for name in os.listdir(self.folder))
            return {queue: found[queue] for queue in QUEUES}
        try:
            return {queue: self.redis.llen(queue) for queue in QUEUES}
        except RedisError as e:
            raise ConnectionError(f"the broker is away: {e}") from e
