"""Requests of the service's own, to servers that mean it no good."""
import asyncio
import contextlib
import gzip
import os
import socket
import ssl
import subprocess
import sys
import threading
import time

import aiohttp
import gevent
import pytest
from certificates import ADDRESS, certificate
from conftest import ROOT
from cryptography import x509
from hostile_server import HostileServer, ok, repeatedly

from app.outbound import http
from app.outbound.addresses import NotAllowed, check_url
from app.outbound.event_loop import run
from app.outbound.http import RequestFailed, TooLarge

LOOPBACK = ("127.0.0.0/8",)
LONG_S = 120  # for what only a machine that is very busy takes so long for
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
BOMB = gzip.compress(bytes(2**24))


@pytest.fixture
def server():
    one = HostileServer()
    yield one
    one.close()


@pytest.fixture
def client():
    return http.Client(LOOPBACK)


def target(server, path="/", host=None):
    return check_url((f"http://{host}:{server.port}" if host else server.url) + path,
                     [f"http://{host or '127.0.0.1'}:{server.port}"], LOOPBACK)


def fetch(client, server, answer, most=1000, within_s=LONG_S):
    server.answers["/"] = answer
    return run(client.fetch(target(server), most, within_s))


def test_fetches_and_says_no_more_about_itself_than_needed(client, server):
    assert fetch(client, server, ok(b"a" * 1000)) == b"a" * 1000
    assert fetch(client, server, CHUNKED + b"3\r\nabc\r\n0\r\n\r\n") == b"abc"
    assert fetch(client, server, b"HTTP/1.0 200 OK\r\n\r\nto the end") == b"to the end"
    head = server.requests[0].lower()
    assert b"\r\naccept-encoding: identity\r\n" in head
    assert {line.split(b":")[0] for line in head.split(b"\r\n")[1:-2]} == {
        b"host", b"user-agent", b"accept", b"accept-encoding"}


def test_neither_proxies_nor_cookies_nor_netrc_are_used(client, server, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    fetch(client, server, ok(b"1", b"Set-Cookie: a=b; Path=/"))
    assert fetch(client, server, ok(b"2")) == b"2"
    assert b"cookie" not in server.requests[1].lower()
    assert b"authorization" not in server.requests[1].lower()


@pytest.mark.parametrize(("answer", "error", "says"), [
    (ok(b"a" * 1001), TooLarge, "it has more than 1 kB"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n", TooLarge, "it has more than 1 kB"),
    (repeatedly(CHUNKED, b"3e8\r\n" + b"a" * 1000 + b"\r\n"), TooLarge, "it has more than 1 kB"),
    (repeatedly(b"HTTP/1.1 200 OK\r\n\r\n", b"a" * 1000), TooLarge, "it has more than 1 kB"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", RequestFailed, "ended the connection before"),
    (CHUNKED + b"9\r\nabc", RequestFailed, "ended the connection before"),
    (CHUNKED + b"zz\r\nabc\r\n", RequestFailed, "its server"),
    (b"", RequestFailed, "ended the connection before"),
    (b"\x00\xff\r\n\r\n", RequestFailed, "did not answer in valid HTTP"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", RequestFailed, "did not answer in valid HTTP"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", RequestFailed, "did not answer in valid"),
    (ok(b"", b"X: " + b"a" * 10_000), RequestFailed, "did not answer in valid HTTP"),
    (repeatedly(b"HTTP/1.1 200 OK\r\n", b"X: a\r\n"), RequestFailed, "did not answer in valid HTTP"),
    (repeatedly(b"HTTP/1.1 ", b"2" * 1000), RequestFailed, "did not answer in valid HTTP"),
    (ok(BOMB, b"Content-Encoding: gzip"), RequestFailed, "compressed"),
    (ok(b"a", b"Content-Encoding: identity", b"Content-Encoding: br"), RequestFailed, "compressed"),
    (b"HTTP/1.1 302 Found\r\nLocation: /other\r\nContent-Length: 0\r\n\r\n", RequestFailed, r"redirect \(302\)"),
    (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", RequestFailed, "answered 404"),
    (b"HTTP/1.1 206 Partial Content\r\nContent-Length: 1\r\n\r\na", RequestFailed, "answered 206"),
    (b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n", RequestFailed, "answered 500"),
])
def test_answers_that_are_not_what_was_asked_for(client, server, answer, error, says):
    server.answers["/other"] = ok(b"never asked for")
    with pytest.raises(RequestFailed, match=says) as e:
        fetch(client, server, answer)
    assert type(e.value) is error
    assert {request.split()[1] for request in server.requests} == {b"/"}


@pytest.mark.parametrize("answer", [
    repeatedly(b"", b"", 0.05),
    repeatedly(b"HTTP/1.1 200 OK\r\nX: ", b"a", 0.05),
    repeatedly(b"HTTP/1.1 200 OK\r\n\r\n", b"a", 0.05),
    repeatedly(CHUNKED, b"1\r\na\r\n", 0.05),
    repeatedly(CHUNKED + b"1;", b"a", 0.05),
    repeatedly(b"", b"HTTP/1.1 102 Processing\r\n\r\n", 0.05),
], ids=["silence", "headers", "body", "chunks", "chunk extension", "102"])
def test_a_server_that_drips_cannot_stretch_the_time(client, server, answer):
    with pytest.raises(TimeoutError):
        fetch(client, server, answer, most=10**6, within_s=0.3)
    assert fetch(client, server, ok(b"fresh")) == b"fresh"  # on a connection without the rest of the other answer


def test_what_counts_the_pieces_can_stop_them(client, server):
    server.answers["/"] = repeatedly(CHUNKED, b"3e8\r\n" + b"a" * 1000 + b"\r\n")
    sizes = []

    def taken(size):
        sizes.append(size)
        if sum(sizes) >= 100_000:
            raise TooLarge("enough")
    with pytest.raises(TooLarge, match="enough"):
        run(client.fetch(target(server), 10**9, 10, taken))
    assert 100_000 <= sum(sizes) < 1_000_000


def test_unreachable_servers_and_unknown_names(client, server, monkeypatch):
    server.close()
    with pytest.raises(RequestFailed, match="cannot be reached"):
        run(client.fetch(target(server), 1, LONG_S))

    def unknown(*_, **__):  # as the real one says, which takes long where no DNS can be reached
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(RequestFailed, match="the name of its server cannot be resolved"):
        run(client.fetch(check_url("http://no-such-name.invalid/", None, LOOPBACK), 1, LONG_S))


def tls_server(folder, host):
    """(a HostileServer with a certificate for that host, signed by itself; the path of the certificate)."""
    path, context = certificate(folder / "own.pem", host), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return HostileServer({"/": ok(b"trusted")}, tls=context), path


def test_tls_needs_a_valid_certificate(client, tmp_path):
    server, _ = tls_server(tmp_path, ADDRESS)
    with pytest.raises(RequestFailed, match="the certificate of its server is not valid"):
        run(client.fetch(check_url(server.url, [server.url], LOOPBACK), 10, LONG_S))
    server.close()
    assert server.requests == []


@pytest.mark.parametrize(("host", "says"), [
    (ADDRESS, "b'trusted'"), (x509.DNSName("other.example"), "the certificate of its server is not valid")])
def test_a_certificate_must_be_that_of_the_host(tmp_path, host, says):
    server, path = tls_server(tmp_path, host)
    program = ("from app.outbound import http\nfrom app.outbound.addresses import check_url\n"
               "from app.outbound.event_loop import run\n"
               f"checked = check_url({server.url!r}, [{server.url!r}], {LOOPBACK!r})\n"
               f"try: print(run(http.Client({LOOPBACK!r}).fetch(checked, 10, {LONG_S})))\n"
               "except http.RequestFailed as e: print(e)")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "SSL_CERT_FILE": str(path)},
                          text=True, capture_output=True, check=False)
    server.close()
    assert (done.stdout, len(server.requests)) == (says + "\n", says == "b'trusted'"), done.stderr


# --- addresses behind names ---

def resolving(monkeypatch, *answers):
    """DNS gives each name these addresses, with each question the next list of them."""
    left = list(answers)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, *_, **__: [
        (socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
        for address in (left.pop(0) if len(left) > 1 else left[0])])


@pytest.mark.parametrize("address", ["127.0.0.1", "169.254.169.254", "10.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_a_name_that_resolves_to_a_private_address_is_refused(server, monkeypatch, address):
    resolving(monkeypatch, [address])
    server.answers["/"] = ok(b"secret")
    client = http.Client(())
    url = f"http://innocent.example:{server.port}/"
    with pytest.raises(NotAllowed):
        run(client.fetch(check_url(url, [url], ()), 100, LONG_S))
    assert server.requests == []


def test_what_the_resolver_gives_is_allowed(monkeypatch):
    resolving(monkeypatch, ["10.0.0.1", "8.8.8.8", "::1"])
    assert [one["host"] for one in run(http.Resolver(()).resolve("several.example"))] == ["8.8.8.8"]
    assert [one["host"] for one in run(http.Resolver(("10.0.0.0/8",)).resolve("several.example"))] == [
        "10.0.0.1", "8.8.8.8"]


def test_a_name_that_changes_after_it_was_asked_gains_nothing(client, server, monkeypatch):
    """What is resolved is what is connected to, for each connection anew."""
    server.answers["/"] = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nyes"
    resolving(monkeypatch, ["127.0.0.1"], ["10.0.0.1"])
    url = f"http://rebound.example:{server.port}/"
    checked = check_url(url, [url], LOOPBACK)
    assert run(client.fetch(checked, 100, LONG_S)) == b"yes"
    with pytest.raises(NotAllowed):
        run(client.fetch(checked, 100, LONG_S))
    assert len(server.requests) == 1


def test_of_several_addresses_only_the_allowed_ones_are_tried(client, server, monkeypatch):
    server.answers["/"] = ok(b"yes")
    resolving(monkeypatch, ["169.254.169.254", "::1", "127.0.0.1"])
    url = f"http://both.example:{server.port}/"
    assert run(client.fetch(check_url(url, [url], LOOPBACK), 100, LONG_S)) == b"yes"


def test_an_address_is_checked_again_when_the_connection_is_made(server):
    """Even if a URL came here unchecked: for an address in a URL no resolver is asked."""
    client = http.Client(())
    with pytest.raises(NotAllowed):
        run(client.fetch(target(server), 100, LONG_S))
    assert server.requests == []


def test_a_lookup_that_hangs_costs_no_more_than_its_time(client, server, monkeypatch):
    hung = threading.Event()
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *arguments, **more: hung.wait(20) if "hung" in host
                        else real(host, *arguments, **more))
    with pytest.raises(TimeoutError):
        run(client.fetch(check_url("http://hung.example/", None, ()), 1, 0.1))
    assert fetch(client, server, ok(b"fresh")) == b"fresh"
    hung.set()


# --- posts ---

def test_posts_and_returns_the_status_whatever_follows(client, server):
    server.answers["/"] = repeatedly(b"HTTP/1.1 202 Accepted\r\n\r\n", b"a", 0.05)
    assert run(client.post(target(server), b"{}", {"X-A": "b"}, LONG_S))[0] == 202
    assert server.requests[0].startswith(b"POST / HTTP/1.1\r\n")
    assert server.requests[0].endswith(b"\r\n\r\n{}")
    server.answers["/"] = b"HTTP/1.1 307 Temporary Redirect\r\nLocation: /other\r\n\r\n"
    assert run(client.post(target(server), b"{}", {}, LONG_S))[0] == 307
    assert len(server.requests) == 2


@pytest.mark.parametrize("has_tls", [False, True], ids=["plain", "tls"])
def test_what_a_receiver_does_not_read_is_not_kept_for_it(tmp_path, monkeypatch, has_tls):
    """When the time is over, the rest of a message is thrown away, however long the receiver leaves it unread."""
    server = tls_server(tmp_path, ADDRESS)[0] if has_tls else HostileServer()
    may_end, descriptors = threading.Event(), lambda: len(os.listdir("/proc/self/fd"))

    def serve(connection):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:  # one may end before TLS has begun
            stack.enter_context(connection)
            if has_tls:
                stack.enter_context(server.tls.wrap_socket(connection, server_side=True))
            may_end.wait(10 * LONG_S)
    server.serve = serve
    if has_tls:
        monkeypatch.setattr(aiohttp.connector, "_SSL_CONTEXT_VERIFIED", aiohttp.connector._SSL_CONTEXT_UNVERIFIED)
    client, checked = http.Client(LOOPBACK), check_url(server.url, [server.url], LOOPBACK)
    run(asyncio.sleep(0))  # so that the event loop has its descriptors
    before = descriptors()
    for _ in range(3):
        with pytest.raises(TimeoutError):
            run(client.post(checked, bytes(2**25), {}, 0.5))
    until = time.monotonic() + LONG_S
    while descriptors() > before + 3:  # the receiver's
        assert time.monotonic() < until
        time.sleep(0.01)
    may_end.set()
    server.close()


def test_interim_answers_without_end_hold_up_no_other(server, monkeypatch):
    """They are read in small pieces, so that each connection gets its turn."""
    server.answers |= {"/flood": repeatedly(b"", b"HTTP/1.1 102 P\r\n\r\n" * 100), "/": ok(b"")}
    client, sizes = http.Client(LOOPBACK, keeps_connections=False), []
    feed = aiohttp.client_proto.ResponseHandler.data_received
    monkeypatch.setattr(aiohttp.client_proto.ResponseHandler, "data_received",
                        lambda protocol, data: (sizes.append(len(data)), feed(protocol, data))[1])
    flooded = gevent.spawn(run, client.post(target(server, "/flood"), b"{}", {}, LONG_S))
    while sum(sizes) < 2**21 and not flooded.ready():
        gevent.sleep(0.005)
    assert run(client.post(target(server), b"{}", {}, LONG_S))[0] == 200
    assert not flooded.ready()
    flooded.kill()
    assert max(sizes) <= 2**15


# --- waiting ---

def test_a_greenlet_that_waits_blocks_no_other_and_can_be_stopped(client, server):
    server.answers["/"] = repeatedly(CHUNKED, b"1\r\na\r\n", 0.05)
    waiting = gevent.spawn(run, client.fetch(target(server), 10**6, LONG_S))
    while not server.requests and not waiting.ready():
        gevent.sleep(0.005)
    assert not waiting.ready()  # as it would be if nothing else had run until its time was up
    waiting.kill(timeout=LONG_S)
    assert waiting.dead
    server.answers["/"] = ok(b"greenlet")
    assert gevent.spawn(run, client.fetch(target(server), 10, LONG_S)).get(timeout=LONG_S) == b"greenlet"


def test_native_threads_wait_side_by_side(client, server):
    server.answers["/"] = ok(b"thread")
    found = []
    threads = [threading.Thread(target=lambda: found.append(run(client.fetch(target(server), 10, LONG_S))))
               for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
    assert found == [b"thread"] * 10


def test_whoever_stops_waiting_ends_the_request(client, server):
    ended = threading.Event()

    def answer(connection, closed):
        connection.settimeout(LONG_S)
        if connection.recv(1) == b"":
            ended.set()
    server.answers["/"] = answer
    waiting = gevent.spawn(run, client.fetch(target(server), 10**6, LONG_S))
    while not server.requests and not waiting.ready():
        gevent.sleep(0.005)
    waiting.kill(timeout=LONG_S)
    assert ended.wait(LONG_S)
