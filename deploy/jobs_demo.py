"""`make jobs-demo`: jobs, a callback (webhook) and the history on this machine, with the commands to do it by hand.

Starts Redis, PostgreSQL, the service and a worker on loopback, in a temporary folder, and sends a picture, a batch and
a video. Whether it ends, fails or is interrupted, it stops all of them and removes the folder. With `--embedded` there
are no servers: jobs and history are in files.
"""
import argparse
import base64
import contextlib
import glob
import hashlib
import hmac
import http.client
import http.server
import json
import os
import queue
import random
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import cv2
import psycopg

from app.config import Settings
from app.optional_settings import OptionalSettings

ROOT = Path(__file__).parent.parent
PICTURE, NO_PICTURE = "tests/images/chelsea.jpg", "README.md"
PACKAGES = {"curl": "curl", "redis-server": "redis-server", "initdb": "postgresql", "postgres": "postgresql"}
START_WITHIN_S = 300  # the model may have to be converted first
JOB_WITHIN_S = 120
STOP_WITHIN_S = 20
KEPT = {"MODEL_NAME", "MODEL_PATH", "MODEL_DIR", "LABELS_PATH", "WEIGHTS_MIRROR", "DEVICE"}
OTHERS = {name.upper() for name in (*Settings.__dataclass_fields__, *OptionalSettings.__dataclass_fields__)} - KEPT


class DemoError(Exception):
    """Why the demonstration ends early."""


class Program:
    """A process that logs to a file. variables: settings of the service; user: as whom it runs, if not as this one."""

    def __init__(self, folder, name, command, variables=None, user=None):
        self.folder, self.name, self.command, self.user = folder, name, command, user
        self.variables, self.process = variables or {}, None

    def start(self, is_ready):
        """Start it, and wait until is_ready(). Raises DemoError."""
        log_path = self.folder / f"{self.name}.log"
        environment = {name: value for name, value in os.environ.items() if name not in OTHERS}
        environment = {"MODEL_NAME": "efficientnet_lite0", "MODEL_DIR": str(ROOT / "models"), **environment,
                       "PYTHONPATH": str(ROOT), "TMPDIR": str(self.folder), **self.variables}
        with open(log_path, "w") as log, later_interrupt():
            # In the folder, so that no .env is read; in a session of its own, so that Ctrl-C is for this script alone.
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            cwd=self.folder, env=environment, user=self.user, start_new_session=True)
        until = time.monotonic() + START_WITHIN_S
        while not is_ready():
            if self.process.poll() is not None or time.monotonic() > until:
                raise DemoError(f"{self.name} does not start:\n{log_path.read_text()[-2000:]}")
            time.sleep(0.05)

    def stop(self):
        if self.process is None:
            return
        self.process.send_signal(signal.SIGINT if self.name == "postgres" else signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_WITHIN_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # with what it has started
        self.process.wait()


@contextlib.contextmanager
def later_interrupt():
    """Ctrl-C takes effect at the end of the block: in the middle of Popen, nobody would know what it has started."""
    interrupts = []
    before = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupts:
        raise KeyboardInterrupt


def program(name):
    """The path of a program. Raises DemoError. Debian keeps PostgreSQL's beside the PATH."""
    folders = [os.environ.get("PATH", os.defpath), *sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)]
    path = shutil.which(name, path=os.pathsep.join(folders))
    if path is None:
        raise DemoError(f"{name} is missing: apt install {PACKAGES[name]}" +
                        ("" if name == "curl" else ", or make jobs-demo ARGS=--embedded"))
    return path


def free_port():
    """A port below those that the kernel gives to outgoing connections, one of which could have it before its server.
    """
    while True:
        port = random.randrange(11_000, 32_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def say(text):
    print(f"\n# {text}", flush=True)


def show(command):
    print(f"$ {command}", flush=True)


# --- the servers ---

def start_redis(folder, stack, user):
    """Its URL."""
    port, password = free_port(), secrets.token_hex(16)  # others on this machine may connect, too
    command = [program("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--requirepass", password,
               "--dir", str(folder), "--appendonly", "yes"]

    def answers():
        try:
            with socket.create_connection(("127.0.0.1", port), 1) as connection:
                connection.sendall(f"AUTH {password}\r\n".encode())
                return connection.recv(5) == b"+OK\r\n"
        except OSError:
            return False
    show(f"redis-server --port {port} --bind 127.0.0.1 --requirepass {password} --appendonly yes &")
    redis = Program(folder, "redis", command, user=user)
    stack.callback(redis.stop)
    redis.start(answers)
    return f"redis://:{password}@127.0.0.1:{port}/0"


def start_postgres(folder, stack, user):
    """Its URL."""
    data, port, password = folder / "database", free_port(), secrets.token_hex(16)
    (folder / "password").write_text(password)
    initdb = [program("initdb"), "--pgdata", data, "--username", "jobs", "--pwfile", folder / "password",
              "--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C", "--no-sync"]
    postgres = Program(folder, "postgres", [program("postgres"), "-D", data, "-h", "127.0.0.1", "-p", str(port),
                                            "-c", "unix_socket_directories="], user=user)

    def answers():
        try:
            psycopg.connect(host="127.0.0.1", port=port, user="jobs", password=password, dbname="postgres",
                            connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True
    show(f"initdb --pgdata {data} --username jobs --pwfile {folder / 'password'} --auth scram-sha-256")
    done = subprocess.run(initdb, user=user, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DemoError(f"initdb failed:\n{done.stderr[-2000:]}")
    show(f"postgres -D {data} -h 127.0.0.1 -p {port} &")
    stack.callback(postgres.stop)
    postgres.start(answers)
    return f"postgresql+psycopg://jobs:{password}@127.0.0.1:{port}/postgres"


def start_servers(folder, stack):
    """Variables of a service that uses them."""
    for name in ("redis-server", "initdb", "postgres"):
        program(name)
    user = "nobody" if os.getuid() == 0 else None  # PostgreSQL refuses to run as root
    folders = [folder / "redis", folder / "postgres"]
    for path in folders:
        path.mkdir(mode=0o700)
        if user:
            shutil.chown(path, user)
    say("Redis and PostgreSQL")
    return {"JOBS_BROKER": start_redis(folders[0], stack, user),
            "DATABASE_URL": start_postgres(folders[1], stack, user)}


# --- the service, its worker, and a receiver of webhooks ---

def receive_webhooks(stack):
    """(URL, queue.Queue of (headers, body)) of a server that accepts every POST."""
    received = queue.Queue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(204)
            self.end_headers()
            received.put((self.headers, body))

        def log_message(self, *_):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stack.callback(server.shutdown)
    return f"http://127.0.0.1:{server.server_port}/", received


def answers_health(port):
    def ask():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        return False
    return ask


def start_service(folder, stack, variables):
    """The service's URL."""
    port, worker_port = free_port(), free_port()
    variables |= {"HOST": "127.0.0.1", "PORT": str(port), "JOBS": "on", "HISTORY": "on",
                  "DATA_DIR": str(folder / "data")}
    say("The service and a worker, with the same settings, also if they are on different machines")
    for name, value in variables.items():
        show(f"export {name}={shlex.quote(value)}")
    variables |= {"DRAIN_SECONDS": "0", "LOG_FORMAT": "text"}
    gunicorn = [sys.executable, "-m", "gunicorn", "-c", str(ROOT / "gunicorn.conf.py"), "app:create_app()"]
    for name, command, shown, its_port, more in (
            ("service", gunicorn, "make run &", port, {}),
            ("worker", [sys.executable, "-m", "app", "worker"], "make worker &", worker_port,
             {"WORKER_PORT": str(worker_port)})):
        show(shown)
        running = Program(folder, name, command, variables | more)
        stack.callback(running.stop)
        running.start(answers_health(its_port))
    return f"http://127.0.0.1:{port}"


# --- the client ---

def curl(*arguments):
    """Show a curl command, run it, and return what it prints. Raises DemoError."""
    show(shlex.join(["curl", *arguments]))
    return run_curl(*arguments)


def run_curl(*arguments):
    done = subprocess.run([program("curl"), "--silent", "--show-error", "--noproxy", "*", "--max-time", "60",
                           *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DemoError(done.stderr)
    return done.stdout


def asked(*arguments):
    """A JSON body, of an answer without an error."""
    text = curl(*arguments)
    try:
        body = json.loads(text)
    except ValueError as e:
        raise DemoError(f"unexpected answer: {text[:2000]}") from e
    if body.get("status") != "success":
        raise DemoError(f"the service answers:\n{text[:2000]}")
    return body


def print_some(body, *names):
    print(json.dumps({name: body[name] for name in names}))


def do_job(url, *arguments):
    """Submit a job; returns it once it has succeeded."""
    job = asked(*arguments, f"{url}/jobs")
    print_some(job, "id", "state", "queue", "url")
    until = time.monotonic() + JOB_WITHIN_S
    while job["state"] in ("queued", "running"):
        if time.monotonic() > until:
            raise DemoError(f"the job is still {job['state']} after {JOB_WITHIN_S} s")
        time.sleep(1)
        job = asked(f"{url}{job['url']}")
        print_some(job, "state", "progress")
    if job["state"] != "succeeded":
        raise DemoError(f"the job has {job['state']}: {job['error']}")
    return job


def best(answer):
    """What a result says first."""
    if answer["status"] == "error":
        return f"{answer['error']}: {answer['message']}"
    predictions = answer["predictions"]
    return cut(json.dumps(predictions[0] if isinstance(predictions, list) else predictions))


def cut(line):
    return line if len(line) <= 120 else line[:119] + "…"


def make_video(path):
    """Two seconds in which the view moves over a picture."""
    picture = cv2.imread(str(ROOT / PICTURE))
    height, width = (side // 2 * 2 for side in (picture.shape[0], picture.shape[1] - 100))
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 25, (width, height))
    for x in range(0, 100, 2):
        video.write(picture[:height, x:x + width])
    video.release()


def is_signed(headers, body, secret):
    """Whether a webhook comes from a service with this CALLBACK_SECRET, as https://www.standardwebhooks.com has it."""
    content = b".".join([headers["Webhook-Id"].encode(), headers["Webhook-Timestamp"].encode(), body])
    signature = "v1," + base64.b64encode(hmac.digest(secret.encode(), content, hashlib.sha256)).decode()
    return hmac.compare_digest(signature, headers["Webhook-Signature"])


def demonstrate(folder, stack, is_embedded):
    program("curl")
    servers = {} if is_embedded else start_servers(folder, stack)
    callback, received = receive_webhooks(stack)
    secret = secrets.token_hex(16)
    url = start_service(folder, stack, servers | {
        "CALLBACK_SECRET": secret, "CALLBACK_URLS": callback, "PRIVATE_NETWORKS": "127.0.0.1/32"})

    say("Submit a picture, with a callback")
    job = do_job(url, "-F", f"file=@{PICTURE}", "-F", f"callback_url={callback}")
    print(best(job["result"]))
    try:
        headers, body = received.get(timeout=JOB_WITHIN_S)
    except queue.Empty as e:
        raise DemoError(f"no callback after {JOB_WITHIN_S} s") from e
    if not is_signed(headers, body, secret):
        raise DemoError("the callback's signature is wrong")
    print(f"{callback} received the callback {json.loads(body)['event']}; signature verified")

    say("A batch, in which one file is not a picture")
    job = do_job(url, "-F", f"files=@{PICTURE}", "-F", f"files=@{NO_PICTURE}")
    for result in job["result"]["results"]:
        print(f"{result['filename']}: {best(result)}")

    say("A video")
    make_video(folder / "clip.mp4")
    job = do_job(url, "-F", f"file=@{folder / 'clip.mp4'}", "-F", "frames=4")
    print(best(job["result"]))

    say("The jobs, newest first")
    for job in asked(f"{url}/jobs")["jobs"]:
        print_some(job, "id", "state", "queue", "model")

    say("The history, as a table")
    table, until = ("-H", "Accept: text/csv", f"{url}/history"), time.monotonic() + JOB_WITHIN_S
    while len(run_curl(*table).splitlines()) < 4 and time.monotonic() < until:  # it is written twice a second
        time.sleep(0.2)
    for line in curl(*table).splitlines():
        print(cut(line))


def main():
    parser = argparse.ArgumentParser(prog="make jobs-demo", description="Show jobs, callbacks and the history at work.")
    parser.add_argument("--embedded", action="store_true", help="without Redis and PostgreSQL")
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    code = 0
    with tempfile.TemporaryDirectory(prefix="jobs-demo-") as folder, contextlib.ExitStack() as stack:
        os.chmod(folder, 0o711)  # for the servers' user
        try:
            demonstrate(Path(folder), stack, arguments.embedded)
        except DemoError as e:
            print(f"error: {e}", file=sys.stderr)
            code = 1
        except KeyboardInterrupt:
            code = 130
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # until everything has been stopped
    say("All of it is stopped, and its files are removed.")
    return code


if __name__ == "__main__":
    sys.exit(main())
