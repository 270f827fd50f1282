"""HTTP requests of the service's own: to checked addresses only, without redirects, proxies, cookies and compression,
within limits of time and size that no server can stretch."""
import asyncio
import contextlib
import contextvars
import functools
import io
import socket
import threading

import aiohttp
import yarl
from aiohttp.abc import AbstractResolver

from app import sizes
from app.config import NAME, VERSION
from app.outbound import addresses
from app.outbound.event_loop import close_with, loop

MOST_LOOKUPS = 256  # native threads that ask DNS, for up to half a minute each if it does not answer
own_sockets = contextvars.ContextVar("own_sockets")  # those of a POST


class RequestFailed(Exception):
    """The message says why in words that may be shown to clients."""


class TooLarge(RequestFailed):
    """What was sent has more bytes than allowed."""


class Client:
    """Makes requests in the event loop of event_loop.py. private_networks: see addresses.check_url; keeps_connections:
    for later requests, of which a POST is not repeated if its server has just closed the connection; is_traced: whether
    each has a span."""

    def __init__(self, private_networks, keeps_connections=True, is_traced=False):
        self.private_networks, self.keeps_connections = private_networks, keeps_connections
        self.is_traced = is_traced
        self.session = self.loop = None

    async def fetch(self, target, most_bytes, within_s, taken=lambda size: None):
        """The bytes behind an addresses.Target. taken: is told of each piece's size, and may raise.

        Raises RequestFailed, NotAllowed, TimeoutError.
        """
        async with asyncio.timeout(within_s), self.request("GET", target, {"Accept-Encoding": "identity"}) as answer:
            if 300 <= answer.status < 400:
                raise RequestFailed(f"its server answered with a redirect ({answer.status}), which is not followed")
            if answer.status != 200:
                raise RequestFailed(f"its server answered {answer.status}")
            encodings = answer.headers.getall("Content-Encoding", [])
            if any(encoding.strip().lower() not in ("", "identity") for encoding in encodings):
                raise RequestFailed("its server sent it compressed, which was not asked for")
            if (answer.content_length or 0) > most_bytes:
                raise too_large(most_bytes)
            body = io.BytesIO()
            async for piece in answer.content.iter_any():
                body.write(piece)
                taken(len(piece))
                if body.tell() > most_bytes:
                    raise too_large(most_bytes)
            return body.getvalue()

    async def post(self, target, body, headers, within_s):
        """Send bytes to an addresses.Target and return the status and the headers of the answer, which is not read.
        Raises as fetch."""
        made = []
        own_sockets.set(made)  # in this task
        try:
            async with asyncio.timeout(within_s), self.request(
                    "POST", target, headers, data=io.BytesIO(body)) as answer:
                answer.close()
                return answer.status, answer.headers
        finally:  # or else what has not been sent stays in memory for as long as the receiver does not read it
            for one in made:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def request(self, method, target, headers, **options):
        def send(headers):
            return Request(self.own_session().request(method, yarl.URL(target.url, encoded=True), headers=headers,
                                                      allow_redirects=False, **options))
        if self.is_traced:
            from app.tracing import spans
            return spans.outgoing(method, target, headers, send)
        return send(headers)

    def own_session(self):
        if self.loop is not loop():  # the first time, and in a process that was forked
            self.loop = loop()
            connector = aiohttp.TCPConnector(limit=0, use_dns_cache=False, force_close=not self.keeps_connections,
                                             resolver=Resolver(self.private_networks),
                                             socket_factory=functools.partial(connection, self.private_networks))
            self.session = aiohttp.ClientSession(
                connector=connector, trust_env=False, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
                headers={"User-Agent": f"{NAME}/{VERSION}"})
            close_with(self, self.session.close)
        return self.session


def connection(private_networks, info):
    """The socket for an address, whichever way led to it. Raises NotAllowed."""
    family, kind, protocol, _, address = info
    if not addresses.is_allowed(address[0], private_networks):
        raise addresses.NotAllowed("the address")
    made = socket.socket(family, kind, protocol)
    if (of_post := own_sockets.get(None)) is not None:  # a GET sends little, and its answer is read
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**13)
        of_post.append(made)
    return made


class Request:
    """Around one answer of aiohttp: what goes wrong is a RequestFailed, and no connection with the rest of an answer is
    kept."""

    def __init__(self, context):
        self.context = context

    async def __aenter__(self):
        try:
            return await self.context.__aenter__()
        except (aiohttp.ClientError, OSError, ValueError) as e:
            raise failure(e) from e

    async def __aexit__(self, kind, error, traceback):
        await self.context.__aexit__(kind, error, traceback)
        if isinstance(error, aiohttp.ClientError | OSError) and not isinstance(error, TimeoutError):
            raise failure(error) from error


def failure(error):
    """The exception to raise for one of aiohttp's, or of the network's."""
    if isinstance(error, addresses.NotAllowed | TimeoutError):
        return error
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return RequestFailed("the name of its server cannot be resolved")
    if isinstance(error, aiohttp.ClientSSLError):
        return RequestFailed("the certificate of its server is not valid")
    if isinstance(error, aiohttp.ClientConnectorError):
        return RequestFailed("its server cannot be reached")
    if isinstance(error, aiohttp.ClientPayloadError | aiohttp.ServerDisconnectedError | OSError):
        return RequestFailed("its server ended the connection before it had sent everything")
    return RequestFailed("its server did not answer in valid HTTP")


def too_large(most_bytes):
    return TooLarge(f"it has more than {sizes.words(most_bytes)}")


class Resolver(AbstractResolver):
    """What DNS says when a connection is made, less the addresses that are not allowed: a name that changes after it
    was checked gains nothing. Each lookup has a native thread of its own, as it may take long and cannot be stopped."""
    threads = threading.BoundedSemaphore(MOST_LOOKUPS)

    def __init__(self, private_networks):
        self.private_networks = private_networks

    async def resolve(self, host, port=0, family=socket.AF_UNSPEC):
        if not self.threads.acquire(blocking=False):
            raise OSError("too many names are being resolved")
        found = loop().create_future()
        threading.Thread(target=self.look_up, args=(found, host, port, family), name="lookup", daemon=True).start()
        results = [{"hostname": host, "host": address[0], "port": port, "family": of, "proto": protocol,
                    "flags": socket.AI_NUMERICHOST} for of, _, protocol, _, address in await found
                   if addresses.is_allowed(address[0], self.private_networks)]
        if not results:
            raise addresses.NotAllowed("the address")
        return results

    def look_up(self, found, *arguments):
        try:
            outcome = socket.getaddrinfo(*arguments, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as e:
            outcome = OSError(*e.args)
        finally:
            self.threads.release()
        loop().call_soon_threadsafe(settle, found, outcome)

    async def close(self):
        """There is nothing to close."""


def settle(future, outcome):
    if not future.cancelled():
        (future.set_exception if isinstance(outcome, OSError) else future.set_result)(outcome)
