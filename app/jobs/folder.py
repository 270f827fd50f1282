"""The broker's folder: kombu's, but that a message is whole as soon as it is seen, and belongs to who removes it. Of
two processes, one of kombu's own may read what the other is about to write, and end; and it sorts all for each that it
takes, which it moves to /tmp first."""
import os
import time
import uuid
from pathlib import Path
from queue import Empty

from kombu.exceptions import ChannelError
from kombu.transport import filesystem
from kombu.utils.json import dumps, loads


class Channel(filesystem.Channel):
    def _put(self, queue, payload, **_):
        path = Path(self.data_folder_out, f"{round(1000 * time.monotonic())}_{uuid.uuid4()}.{queue}.msg")
        part = path.with_name(f"{path.name}.part")
        try:
            part.write_text(dumps(payload))
            part.replace(path)
        except OSError as e:
            part.unlink(missing_ok=True)
            raise ChannelError(f"cannot add {path}: {e}") from e

    def _get(self, queue):
        """Any message of the queue: each leads to the job whose turn it is. One that cannot be taken keeps no other
        from being taken."""
        failure = None
        with os.scandir(self.data_folder_in) as entries:
            for entry in entries:
                if entry.name.partition(".")[2] == f"{queue}.msg":
                    path = Path(entry.path)
                    try:
                        payload = path.read_bytes()
                        path.unlink()
                        return loads(payload)
                    except (FileNotFoundError, ValueError):  # another process was first; or a power cut damaged it,
                        continue                             # and the upkeep sends it again
                    except OSError as e:
                        failure = ChannelError(f"cannot take {path}: {e}")
        raise failure or Empty


class Transport(filesystem.Transport):
    Channel = Channel
