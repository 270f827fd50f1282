"""Authentication, CORS and rate limits (API_KEYS, CORS_ORIGINS, RATE_LIMIT), checked before the body is read.

The probes, the page at / and the API's description need no key. Only predictions count against RATE_LIMIT.
"""
import hashlib
import hmac
import ipaddress
import logging
import time

from flask import current_app, g, request
from werkzeug.middleware.proxy_fix import ProxyFix

from app.engine.slots import in_native_thread
from app.errors import ServiceError

OPEN_ENDPOINTS = ("info.index", "static")
OPEN_BLUEPRINTS = ("health", "docs")
LIMITED_BLUEPRINTS = ("predict", "batch")
REDIS_TIMEOUT_S = 0.1  # a request waits this long when an outage starts, and at each of the ever rarer retries

log = logging.getLogger(__name__)


def register(app, settings):
    if settings.trusted_proxies:
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=settings.trusted_proxies, x_proto=0, x_host=0)
    if settings.cors_origins:
        from flask_cors import CORS
        CORS(app, origins=list(settings.cors_origins), send_wildcard="*" in settings.cors_origins,
             methods=["GET", "HEAD", "POST", "PUT"], max_age=600,
             allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-ID", "X-Request-Timeout"],
             expose_headers=["Retry-After", "Server-Timing", "X-Cache", "X-Request-ID"])
    if settings.api_keys:
        app.extensions["api_keys"] = [digest(key) for key in settings.api_keys]
        app.before_request(require_key)
    if settings.rate_limit:
        limit(app, settings)


# --- keys ---

def digest(key):
    return hashlib.sha256(key.encode()).digest()


def require_key():
    """Raises ServiceError UNAUTHORIZED if the request needs a valid key and has none."""
    is_open = request.endpoint is None or request.endpoint in OPEN_ENDPOINTS or request.blueprint in OPEN_BLUEPRINTS
    if is_open or request.method == "OPTIONS":  # a browser's preflight request has no key
        return
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else request.headers.get("X-API-Key", "").strip()
    given = digest(given)
    # Equal lengths and no early exit: the time taken reveals nothing about the keys.
    if not sum([hmac.compare_digest(given, known) for known in current_app.extensions["api_keys"]]):
        raise ServiceError(401, "UNAUTHORIZED", "This needs a valid key: send one as 'Authorization: Bearer KEY' "
                                                "or in the header X-API-Key.")
    g.client = given.hex()


# --- limits ---

def limit(app, settings):
    """Rate-limit predictions per client with flask-limiter, counting in Redis or, without it, in this process."""
    from flask_limiter import Limiter, RateLimitExceeded  # adds 50 ms to a worker's start
    is_redis, options = settings.rate_limit_storage != "memory://", {}
    if is_redis:
        from redis.backoff import NoBackoff
        from redis.retry import Retry
        options = {"socket_timeout": REDIS_TIMEOUT_S, "socket_connect_timeout": REDIS_TIMEOUT_S,
                   "retry": Retry(NoBackoff(), 0)}
    logging.getLogger("flask-limiter").setLevel(logging.WARNING)  # the request's own log line has each refusal
    limiter = Limiter(client, application_limits=[settings.rate_limit], storage_uri=settings.rate_limit_storage,
                      storage_options=options, in_memory_fallback_enabled=True, swallow_errors=True,
                      key_prefix="model-server")
    limiter.init_app(app)
    hit = app.before_request_funcs[None].pop()  # flask-limiter's own check, which would block the event loop on Redis

    def check():
        try:
            hit()
        except RateLimitExceeded as e:
            raise refusal(limiter) from e

    @app.before_request
    def check_limit():
        if request.method == "OPTIONS" or request.blueprint not in LIMITED_BLUEPRINTS:
            return
        if is_redis:
            in_native_thread(check)
        else:
            check()


def client():
    """Whose limit a prediction counts against: the key's holder, else the address, of IPv6 the /64 (one client's)."""
    if "client" in g:
        return g.client
    address = request.remote_addr or "unknown"
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    return str(parsed) if parsed.version == 4 else str(ipaddress.ip_network((int(parsed), 64), strict=False))


def refusal(limiter):
    breached = [limit for limit in limiter.current_limits if limit.breached]
    try:
        seconds = max(limit.reset_at for limit in breached) - time.time()
    except Exception as e:  # the storage failed in between
        log.warning("the rate limit's storage is unreachable: %s", e)
        seconds = 1
    allowed = "; ".join(str(limit.limit) for limit in breached)
    return ServiceError(429, "RATE_LIMITED", f"Too many requests: {allowed} are allowed; try again later.",
                        retry_after_s=seconds)
