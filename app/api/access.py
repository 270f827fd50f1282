"""Authentication, CORS and rate limits (API_KEYS, ADMIN_KEYS, CORS_ORIGINS, RATE_LIMIT), checked before the body is
read.

The probes, the page at / and the API's description need no key. Only predictions and jobs count against RATE_LIMIT.
"""
import hashlib
import hmac
import ipaddress

from flask import current_app, g, request
from werkzeug.middleware.proxy_fix import ProxyFix

from app.errors import ServiceError

OPEN_ENDPOINTS = ("info.index", "static")
OPEN_BLUEPRINTS = ("health", "docs", "v2_health")
LIMITED_BLUEPRINTS, LIMITED_METHODS = ("predict", "batch", "jobs", "embed", "v2"), ("POST", "PUT")
FAILURES = "30/minute"  # requests without a valid key from one address
MOST_PROVEN = 10_000    # pairs of address and key, of 200 bytes each


def register(app, settings):
    if settings.trusted_proxies:
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=settings.trusted_proxies, x_proto=0, x_host=0)
    if settings.cors_origins:
        from flask_cors import CORS
        CORS(app, origins=list(settings.cors_origins), send_wildcard="*" in settings.cors_origins,
             methods=["GET", "HEAD", "POST", "PUT", "DELETE"], max_age=600,
             allow_headers=["Authorization", "Baggage", "Content-Encoding", "Content-Type", "Idempotency-Key",
                            "Inference-Header-Content-Length", "Traceparent", "Tracestate", "X-API-Key", "X-Request-ID",
                            "X-Request-Timeout", *filter(None, [settings.split_header])],
             expose_headers=["Idempotent-Replayed", "Inference-Header-Content-Length", "Location", "Retry-After",
                             "Server-Timing", "X-Cache", "X-Model", "X-Request-ID"])
    if settings.api_keys or settings.rate_limit:
        from app.api.rate_limits import Counts
        counts = Counts(settings.rate_limit_storage)
        if settings.api_keys:
            require_keys(app, settings.api_keys, settings.optional and settings.optional.admin_keys or (), counts)
        if settings.rate_limit:
            limit_predictions(app, settings.rate_limit, counts)


# --- keys ---

def require_keys(app, keys, admin_keys, counts):
    """Refuse requests without a valid key: with 401, or with 429 if their address has sent too many of them.

    From such an address, valid keys are refused as well: being let in would tell a guesser that its guess was right.
    Exempt are keys that were used from there before, so that a guesser does not lock out those who share its address.
    """
    from app.api import rate_limits
    known, failures = [digest(key) for key in (*keys, *admin_keys)], rate_limits.parse(FAILURES)
    admins = {digest(key) for key in admin_keys}
    proven = set()  # (address, digest of a key)

    @app.before_request
    def require_key():
        is_open = request.endpoint is None or request.endpoint in OPEN_ENDPOINTS or request.blueprint in OPEN_BLUEPRINTS
        if is_open or request.method == "OPTIONS":  # a browser's preflight request has no key
            return
        given, address = digest(given_key()), client_address()
        # Equal lengths and no early exit: the time taken reveals nothing about the keys.
        is_valid = bool(sum([hmac.compare_digest(given, key) for key in known]))
        if not (is_valid and (address, given) in proven):
            breach = counts.breach(failures, "failures", address, look_first=True, only_look=is_valid)
            if breach:
                raise rate_limits.refusal(breach, "Too many requests without a valid key from this address: {} are "
                                                  "allowed; try again later.")
            if not is_valid:
                raise ServiceError(401, "UNAUTHORIZED", "This needs a valid key: send one as 'Authorization: Bearer "
                                                        "KEY' or in the header X-API-Key.")
            if len(proven) >= MOST_PROVEN:
                proven.clear()
            proven.add((address, given))
        g.client, g.is_admin = given.hex(), given in admins


def given_key():
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else request.headers.get("X-API-Key", "").strip()


def digest(key):
    return hashlib.sha256(key.encode()).digest()


# --- limits ---

def limit_predictions(app, text, counts):
    """Count each prediction or job against RATE_LIMIT before its body is read, and its further files once it is."""
    from app.api import rate_limits
    limits = rate_limits.parse(text)

    def check(cost, look_first):
        client = g.get("client") or client_address()
        breach = counts.breach(limits, "predictions", client, cost=cost, look_first=look_first)
        if breach:
            fewer = ", or send fewer files" if look_first else ""
            raise rate_limits.refusal(breach, "Too many predictions: {} are allowed, and each file of a batch counts; "
                                              f"try again later{fewer}.")

    @app.before_request
    def check_request():
        if request.method in LIMITED_METHODS and request.blueprint in LIMITED_BLUEPRINTS:
            check(1, False)

    def count_batch(files):
        if files > 1:
            check(files - 1, True)
    app.extensions["count_batch"] = count_batch


def client_id():
    """Who asks, for versions that are chosen by client: the header SPLIT_HEADER, a key, or an address."""
    header = current_app.extensions["settings"].split_header
    return header and request.headers.get(header) or g.get("client") or client_address()


def whose():
    """Whose jobs and records the request may see: the SHA-256 of its key, "" if there are no keys, None for all."""
    return None if g.get("is_admin") else g.get("client", "")


def client_address():
    """The client's address, of IPv6 the /64 (one client's)."""
    address = request.remote_addr or "unknown"
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    return str(parsed) if parsed.version == 4 else str(ipaddress.ip_network((int(parsed), 64), strict=False))
