"""Inputs by reference: {"url": "…"} in JSON bodies, of http, https and S3, from where INPUT_URLS allows.

They are fetched by the event loop of event_loop.py while the request waits in its greenlet, before it asks for a slot:
a slow origin costs a connection, and no one else anything.
"""
import asyncio
import logging
import operator

import gevent
from flask import current_app, g, request

from app import sizes
from app.api import json_body
from app.api.uploads import BATCH_FIELDS, INSTANCES, one_file_limit
from app.engine.slots import in_native_thread
from app.errors import DeadlineExceeded, ServiceError
from app.outbound import addresses, http
from app.outbound.event_loop import run

LARGE = 2**18           # bytes of a JSON body that is searched for URLs in a native thread
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
            self.s3 = S3(settings.optional.tracing)

    def fetch(self, body, most, deadline, tasks, bodies, key):
        """Fetch what the current request's body refers to, and keep it in g.fetched: {URL: bytes or ServiceError}.

        body: as bytes; most: bytes of all that is fetched; tasks: those that may answer; bodies, key: uploads.Bodies,
        and the request's place in it. Raises ServiceError for what concerns the whole request.
        """
        if not request.is_json:
            return
        read = in_native_thread if len(body) > LARGE else operator.call
        g.json_members = read(members_with_urls, body, request.max_json_parts)
        if g.json_members is None:
            g.pop("json_members")
            return
        inputs, options = urls_of(g.json_members, asked_tasks(tasks))
        urls = list(dict.fromkeys(inputs + options))
        if not urls or len(inputs) > self.most_files():  # which is an error later on
            return
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


def members_with_urls(body, most_parts):
    """The members of a JSON body, or None if it has no URLs. Raises ServiceError."""
    has_urls = b'"url"' in body or b"\\u" in body or b"\0" in body[:4]  # in other spellings, or in UTF-16
    return json_body.parse(body, most_parts) if has_urls else None


def asked_tasks(tasks):
    """Those that may answer the current request, by the model that its body names."""
    if len(tasks) < 2 or (request.view_args or {}).get("name"):
        return tasks
    loader, name = current_app.extensions["model"], request.args.get("model") or g.json_members.get("model")
    return loader.tasks(name if isinstance(name, str) else getattr(loader, "default_name", None))


def urls_of(members, tasks):
    """(the URLs of inputs, those of options that are files) in a JSON body's members. For models that take text or
    JSON, a URL is an input like any other."""
    listed = members.get(INSTANCES)
    values = [{"url": members.get("url")}, *(members.get(name) for name in BATCH_FIELDS),
              *(listed if isinstance(listed, list) else [])] if all(task.is_file for task in tasks) else []
    options = [members.get(name) for task in tasks for option in task.options if option.is_file
               for name in (option.name, *option.aliases)]
    return [[url for url in map(json_body.url_of, some) if url is not None] for some in (values, options)]


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
            raise http.TooLarge(f"together, the inputs have more than {sizes.words(self.most)}")
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
