"""The servers beside the service, as real processes on free ports of loopback: Redis and PostgreSQL."""
import contextlib
import glob
import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

START_WITHIN_S = 120  # on a busy machine: one that ends is noticed at once


def find_program(name):
    """The path of a program, or None. Debian keeps PostgreSQL's beside the PATH."""
    folders = [os.environ.get("PATH", os.defpath), *sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)]
    return shutil.which(name, path=os.pathsep.join(folders))


def free_port():
    """A port on which nobody listens. It stays bound until this process ends, so that neither another test nor a
    client's connection gets it; a server can listen there nevertheless, as all of them set SO_REUSEADDR."""
    reserving = socket.socket()
    reserving.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserving.bind(("127.0.0.1", 0))
    port = reserving.getsockname()[1]
    reserving.detach()
    return port


class Server:
    """A process, its children included, that can be stopped, killed, paused and started again with what it has kept.
    user: as whom it runs, if not as the one who runs the tests."""
    user = None

    def __init__(self, folder):
        self.folder, self.port, self.process = Path(folder), free_port(), None
        self.log_path = self.folder / f"{type(self).__name__.lower()}-{self.port}.log"
        self.numbers = itertools.count(1)

    def start(self):
        """Start it and wait until it answers."""
        with open(self.log_path, "a") as log:
            self.process = subprocess.Popen(self.command(), stdout=log, stderr=log, cwd="/", start_new_session=True,
                                            user=self.user)
        until = time.monotonic() + START_WITHIN_S
        while not self.answers():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.log_path.read_text()}"
            assert time.monotonic() < until, f"no answer within {START_WITHIN_S} s:\n{self.log_path.read_text()}"
            time.sleep(0.02)
        return self

    def stop(self):
        """Stop it if it runs, so that it writes what it has."""
        if self.process and self.process.poll() is None:
            self.resume()
            self.process.send_signal(signal.SIGINT)  # PostgreSQL does not wait for its clients then
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self):
        """End all of its processes at once, as a power cut would."""
        self.pause()
        pids = self.send(signal.SIGKILL)
        self.process.wait()
        until = time.monotonic() + START_WITHIN_S
        while any(map(is_running, pids)) and time.monotonic() < until:
            time.sleep(0.01)

    def pause(self):
        """Let it hang: connections are accepted by the kernel, and nothing answers."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGSTOP)
            while state_of(self.process.pid) not in "TZX":  # until then, it could start another process
                time.sleep(0.001)
        self.send(signal.SIGSTOP)

    def resume(self):
        self.send(signal.SIGCONT)

    def send(self, signal_number):
        """To all of its processes, whose IDs it returns."""
        if self.process.poll() is not None:
            return []
        pids = [self.process.pid]
        with contextlib.suppress(FileNotFoundError):
            pids += map(int, Path(f"/proc/{pids[0]}/task/{pids[0]}/children").read_text().split())
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal_number)
        return pids


def is_running(pid):
    return state_of(pid) not in "ZX"


def state_of(pid):
    """A process's state as Linux abbreviates it: T if it is stopped, Z if it has ended, X if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


class Redis(Server):
    """Redis, which keeps what it acknowledges in a file in folder."""

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}/0"

    def database(self):
        """URL of an empty database."""
        return f"redis://127.0.0.1:{self.port}/{next(self.numbers)}"

    def command(self):
        return [find_program("redis-server"), "--port", str(self.port), "--bind", "127.0.0.1", "--dir",
                str(self.folder), "--appendonly", "yes", "--save", "", "--databases", "1000"]

    def answers(self):
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(7) == b"+PONG\r\n"
        except OSError:
            return False


class Postgres(Server):
    """PostgreSQL, whose files are in a folder of their own: it refuses to run as root, and other users cannot enter
    pytest's folders. folder: of its log."""

    def __init__(self, folder):
        super().__init__(folder)
        if os.getuid() == 0:
            self.user = "nobody"
        self.data = Path(tempfile.mkdtemp(prefix="postgres-"))
        if self.user:
            shutil.chown(self.data, self.user)
        subprocess.run([find_program("initdb"), "--pgdata", self.data, "--username", "postgres", "--auth", "trust",
                        "--encoding", "UTF8", "--locale", "C", "--no-sync"], user=self.user, cwd="/", check=True,
                       capture_output=True)

    @property
    def url(self):
        return self.url_of("postgres")

    def url_of(self, database):
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{database}"

    def database(self):
        """URL of an empty database."""
        name = f"test{next(self.numbers)}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url_of(name)

    def execute(self, statement):
        """Execute a statement in the database `postgres`; returns its rows, if it has any."""
        import psycopg
        with psycopg.connect(self.url.replace("+psycopg", ""), autocommit=True, connect_timeout=5) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else None

    def command(self):  # without fsync, what it acknowledges still outlives its processes
        return [find_program("postgres"), "-D", str(self.data), "-p", str(self.port), "-h", "127.0.0.1", "-c",
                "unix_socket_directories=", "-c", "fsync=off", "-c", "shared_buffers=16MB"]

    def answers(self):
        import psycopg
        try:
            self.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def remove(self):
        self.kill()
        shutil.rmtree(self.data, ignore_errors=True)
