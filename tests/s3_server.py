"""An S3 server beside the service: moto's, as a real process on a free port of loopback."""
import socket
import sys

import requests
from servers import Server


class S3(Server):
    """Keeps all in memory."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    @property
    def variables(self):
        """What a program for S3 needs in its environment."""
        return {"AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}

    def bucket(self):
        """The name of an empty bucket."""
        name = f"bucket-{next(self.numbers)}"
        requests.put(f"{self.url}/{name}", timeout=10).raise_for_status()
        return name

    def command(self):
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]

    def answers(self):
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1):
                return True
        except OSError:
            return False
