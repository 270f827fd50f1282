"""Inputs by reference: {"url": "…"} in JSON bodies, of http, https and S3, from where INPUT_URLS allows.

They are fetched by the event loop of event_loop.py while the request waits in its greenlet, before it asks for a slot:
a slow origin costs a connection, and no one else anything.
"""
import asyncio
import logging

import gevent
from flask import current_app, g, request

from app.api import json_body
from app.api.uploads import BATCH_FIELDS, INSTANCES, one_file_limit
from app.errors import DeadlineExceeded, ServiceError
from app.outbound import addresses, http
from app.outbound.event_loop import run

MOST_BODY = 2**18       # bytes of a JSON body that is searched for URLs, which happens in the greenlets' thread
AT_ONCE = 8             # fetches of one request
MOST_FETCHES = 256      # of one process; beyond, requests are refused
SHARE_OF_TIME = 0.75    # of the time that is left for a request; what was fetched by then is still answered

log = logging.getLogger(__name__)


def register(app, settings):
    app.extensions["fetch"] = References(settings).fetch


class References:
    def __init__(self, settings):
        self.settings, self.prefixes = settings, settings.optional.input_urls
        self.client, self.s3 = http.Client(settings.optional.private_networks,
                                           is_traced=settings.optional.tracing), None
        self.running = 0  # fetches that requests may make at the moment
        addresses.check_prefixes("INPUT_URLS", self.prefixes)
        if any(prefix.startswith("s3:") for prefix in self.prefixes):
            from app.outbound.s3 import S3
            self.s3 = S3()

    def fetch(self, body, most, deadline, tasks, bodies, key):
        """Fetch what the current request's body refers to, and keep it in g.fetched: {URL: bytes or ServiceError}.

        body: as bytes; most: bytes of all that is fetched; tasks: those that may answer; bodies, key: uploads.Bodies,
        and the request's place in it. Raises ServiceError for what concerns the whole request.
        """
        if not request.is_json or len(body) > MOST_BODY or b'"url"' not in body:
            return
        g.json_members = json_body.parse(body, request.max_json_parts)
        urls = urls_of(g.json_members)
        if not urls or not takes_files(tasks) or len(urls) > self.most_files():  # which is an error later on
            return
        urls = list(dict.fromkeys(urls))
        places = min(AT_ONCE, len(urls))
        if self.running + places > MOST_FETCHES:
            raise ServiceError(503, "OVERLOADED", "Too many inputs are being fetched; try again later.",
                               retry_after_s=5)
        self.running += places
        held = Held(most, bodies, key)
        bodies.receiving[key] = gevent.getcurrent()
        try:
            g.fetched = run(self.fetch_all(urls, deadline.remaining() * SHARE_OF_TIME, held))
        finally:
            held.greenlet = None
            bodies.receiving.pop(key, None)
            self.running -= places
        held.count()

    def most_files(self):
        is_stream = request.args.get("stream") or g.json_members.get("stream")
        most = {"predict.predict": self.settings.max_batch_files if is_stream else 1,
                "batch.predict_batch": self.settings.max_batch_files}
        return most.get(request.endpoint, self.settings.optional.max_job_files)

    async def fetch_all(self, urls, within_s, held):
        places, until = asyncio.Semaphore(AT_ONCE), asyncio.get_running_loop().time() + within_s

        async def fetch_in_turn(url):
            taken = Taken(held)
            try:
                async with asyncio.timeout_at(until), places:
                    return await self.fetch_one(url, taken)
            except addresses.NotAllowed as e:
                error = ServiceError(400, "URL_NOT_ALLOWED", f"The URL is not allowed: {why_not(e)}.")
            except http.TooLarge as e:
                error = ServiceError(413, "FILE_TOO_LARGE", f"The input cannot be fetched: {e}.")
            except (http.RequestFailed, FileNotFoundError, PermissionError) as e:
                error = ServiceError(422, "INPUT_NOT_FETCHED", f"The input cannot be fetched: {reason(e)}.")
            except TimeoutError:
                error = DeadlineExceeded("fetch")
            except OSError as e:
                log.warning("%s: %s", url.partition("?")[0][:200], e)
                error = ServiceError(422, "INPUT_NOT_FETCHED", "The input cannot be fetched: its server failed.")
            taken.give_back()
            return error
        return dict(zip(urls, await asyncio.gather(*map(fetch_in_turn, urls)), strict=True))

    async def fetch_one(self, url, taken):
        try:
            target = addresses.check_url(url, self.prefixes, self.settings.optional.private_networks)
        except (addresses.NotListed, addresses.PrivateAddress):
            raise
        except addresses.NotAllowed as e:
            raise NoURL(*e.args) from e
        most = one_file_limit(self.settings)
        if target.scheme == "s3":
            return await self.s3.get(target.host, target.path, most, taken)
        return await self.client.fetch(target, most, None, taken)


def urls_of(members):
    """The URLs of all inputs in a JSON body's members."""
    listed = members.get(INSTANCES)
    values = [{"url": members.get("url")}, *(members.get(name) for name in BATCH_FIELDS),
              *(listed if isinstance(listed, list) else [])]
    return [url for url in map(json_body.url_of, values) if url is not None]


def takes_files(tasks):
    """Whether the model that the current request asks for takes files; for others, a URL is an input like any text."""
    if not all(task.is_file for task in tasks) and not (request.view_args or {}).get("name"):
        loader, name = current_app.extensions["model"], request.args.get("model") or g.json_members.get("model")
        tasks = loader.tasks(name if isinstance(name, str) else getattr(loader, "default_name", None))
    return all(task.is_file for task in tasks)


class NoURL(addresses.NotAllowed):
    """Not a URL that everyone reads in the same way."""


def why_not(error):
    """Why a URL is not allowed, in words for clients."""
    if isinstance(error, NoURL):
        return "it is not an absolute http, https or s3 URL without .., // in its path or a user name"
    if isinstance(error, addresses.NotListed):
        return "it does not begin with an entry of INPUT_URLS"
    if isinstance(error, addresses.PrivateAddress):
        return "its address is private, and PRIVATE_NETWORKS does not list it"
    return "INPUT_URLS says which ones are, and private addresses only are with PRIVATE_NETWORKS"


def reason(error):
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    return "the service may not read it" if isinstance(error, PermissionError) else str(error)


class Held:
    """The bytes that one request's fetches hold. They come in the event loop's thread, and count among the bodies in
    that of the greenlets, where too many of them end the request."""

    def __init__(self, most, bodies, key):
        self.most, self.bodies, self.key = most, bodies, key
        self.total = self.counted = 0
        self.greenlet, self.greenlets = gevent.getcurrent(), gevent.get_hub().loop

    def take(self, size):
        self.total += size
        if self.total > self.most:
            raise http.TooLarge(f"together, the inputs have more than {self.most} bytes")
        self.greenlets.run_callback_threadsafe(self.count_meanwhile)

    def count_meanwhile(self):
        if self.greenlet is not None:
            try:
                self.count()
            except ServiceError as e:
                self.greenlet.throw(e)

    def count(self):
        size = self.total - self.counted
        self.counted += size
        self.bodies.add(self.key, size)


class Taken:
    """What one fetch holds of it."""

    def __init__(self, held):
        self.held, self.size = held, 0

    def __call__(self, size):
        self.size += size
        self.held.take(size)

    def give_back(self):
        self.held.total -= self.size
