"""`python3 -m app health`: whether the service at HOST and PORT is ready. A container runs it every few seconds, so it
imports little, and reads nothing of the settings but these two: editing .env makes no running service unhealthy.
"""
import os
import socket
import time

TIMEOUT_S = 2.5  # less than the three seconds of the image's HEALTHCHECK
MOST = 65536     # bytes of an answer: it has some hundred


def main(url=None):
    """Prints one line. Returns the exit code: 0 if the service is ready, else 1."""
    try:
        url = url or url_of_settings()
        text, code = ask(url)
    except (OSError, ValueError) as e:
        text, code = f"no answer from {url or 'the service'}: {getattr(e, 'strerror', None) or e}", 1
    print(text)
    return code


def url_of_settings():
    """HOST and PORT of the environment, else of .env, else their defaults."""
    variables = os.environ
    if not {"HOST", "PORT"} <= variables.keys() and os.path.exists(".env"):
        from dotenv import dotenv_values
        variables = {**dotenv_values(".env", encoding="utf-8-sig"), **os.environ}
    host, port = ((variables.get(name) or "").strip() or default for name, default in (("HOST", ""), ("PORT", "5000")))
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def ask(url):
    """(one line, exit code) for the answer to GET /health, of http://HOST:PORT, https:// or unix:PATH. Never uses a
    proxy; of this machine's own service, no certificate is checked. Raises OSError, ValueError."""
    until = time.monotonic() + TIMEOUT_S
    scheme, _, place = url.partition(":")
    with connect(scheme, place) as connection:
        connection.sendall(b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")
        answer = b""
        while len(answer) < MOST and (piece := connection.recv(MOST)):
            answer += piece
            connection.settimeout(max(0.001, until - time.monotonic()))  # for one that trickles
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split(b"\r\n")[0].split()
    if len(status) < 2 or not status[0].startswith(b"HTTP/"):
        raise ValueError("it speaks no HTTP")
    line = " ".join(body.decode(errors="replace").split())[:2000] or head.decode(errors="replace").splitlines()[0]
    if status[1] == b"200" and not is_healthy(body):
        return f"what answers at {url} is not this service: {line[:200]}", 1
    return line, 0 if status[1] == b"200" else 1


def is_healthy(body):
    """Whether this is what the service, or a worker of jobs, answers when it is ready."""
    import json
    try:
        found = json.loads(body)
    except ValueError:
        return False
    return isinstance(found, dict) and found.get("status") == "healthy" and not found.keys().isdisjoint(
        ("model_loaded", "workers"))


def connect(scheme, place):
    if scheme == "unix":
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(TIMEOUT_S)
        connection.connect(place)
        return connection
    host, _, port = place.strip("/").rpartition(":")
    if scheme not in ("http", "https") or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError("expected http://HOST:PORT, https://HOST:PORT or unix:PATH")
    connection = socket.create_connection((host.strip("[]"), int(port)), TIMEOUT_S)
    if scheme == "http":
        return connection
    import ssl
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(connection)
