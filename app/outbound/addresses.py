"""Which URLs, and which addresses behind their names, the service may ask by itself.

A URL is taken apart here, by rules stricter than those of any client, and put together again: what is fetched is what
was checked, however differently others would read the original.
"""
import ipaddress
import re
import urllib.parse
from dataclasses import dataclass

import idna

from app.config import SettingsError

MOST_CHARACTERS = 4096
PORTS = {"http": 80, "https": 443}
URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9]*)://(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?P<query>\?[^#]*)?(#.*)?")
AUTHORITY = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^\[\]:@]+)(:(?P<port>[0-9]{1,5}))?")
LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")  # a last label for which clients take a host for an IPv4 address
BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
UNRESERVED = re.compile(r"[A-Za-z0-9._~-]")
PATH_SAFE, QUERY_SAFE = "/%:@!$&'()*+,;=~-._", "?/%:@!$&'()*+,;=~-._[]|"

UNICAST = ipaddress.ip_network("2000::/3")    # all of IPv6 that is assigned to hosts on the Internet
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # an IPv4 address in the last 32 bits (RFC 6052)
TO_4 = ipaddress.ip_network("2002::/16")      # an IPv4 address after the first 16 bits (RFC 3056)
MORE_PRIVATE = tuple(map(ipaddress.ip_network, (
    "168.63.129.16/32",                       # Azure's own services, as its machines see them
    "192.0.0.0/24",                           # protocols, of which Oracle's cloud has its metadata in 192.0.0.192
    "192.88.99.0/24",                         # relays of 6to4
    "2001::/23",                              # Teredo and other protocols
    "3fff::/20")))                            # documentation


class NotAllowed(ValueError):
    """A URL, or the address of its host, that may not be reached."""


class NotListed(NotAllowed):
    """A URL that begins with none of the allowed prefixes."""


class PrivateAddress(NotAllowed):
    """A URL with a private address in it. What a name stands for is not told apart: it would tell which names exist."""


@dataclass(frozen=True)
class Target:
    """A checked URL. url: in its normal form; scheme: http, https or s3; host: a name in ASCII, an address, or a
    bucket; port: a number, None for s3; path: from the slash on, or an S3 key."""
    url: str
    scheme: str
    host: str
    port: int | None
    path: str


def check_url(url, allowed_prefixes, private_networks):
    """The Target of a URL. Raises NotAllowed.

    allowed_prefixes: they end at a slash or at the URL's end, such as https://*.example.org/a/ (which
    stands for its subdomains) or s3://bucket/a; None allows http and https to any host on the default port.
    private_networks: texts such as 10.0.0.0/8 that may be reached although they are private. Names are not resolved
    here: is_allowed decides about each address when a connection is made.
    """
    target = parse(url)
    if target.scheme == "s3" and not (allowed_prefixes and target.path):
        raise NotAllowed("this kind of URL")
    if allowed_prefixes is None and target.port != PORTS[target.scheme]:
        raise NotAllowed("the port")
    if allowed_prefixes is not None and not any(begins(target, prefix) for prefix in allowed_prefixes):
        raise NotListed("the URL")
    literal = "127.0.0.1" if f".{target.host}".endswith(".localhost") else target.host.strip("[]")
    if target.scheme != "s3" and is_address(literal) and not is_allowed(literal, private_networks):
        raise PrivateAddress("the address")
    return target


def check_prefixes(variable, prefixes):
    """Raises SettingsError if a setting has a prefix that no URL could begin with."""
    for prefix in prefixes or ():
        try:
            parse(prefix.replace("://*.", "://", 1))
        except NotAllowed as e:
            raise SettingsError(f"{variable} must have URL prefixes, got {prefix!r}") from e


def parse(url):
    """The Target of any http, https or s3 URL. Raises NotAllowed for all that clients read in more than one way."""
    if not isinstance(url, str) or len(url) > MOST_CHARACTERS or re.search(r"[\x00-\x1f\x7f-\xa0\\\"<>^`{}]", url):
        raise NotAllowed("a URL with such characters")
    parts = URL.fullmatch(url)
    if parts is None:
        raise NotAllowed("no URL")
    scheme = parts["scheme"].lower()
    if scheme == "s3":
        return parse_s3(parts)
    if " " in url:
        raise NotAllowed("a URL with such characters")
    if scheme not in PORTS:
        raise NotAllowed("this kind of URL")
    authority = AUTHORITY.fullmatch(parts["authority"])
    if authority is None:
        raise NotAllowed("the host")
    host = normal_host(authority["host"])
    port = int(authority["port"] or PORTS[scheme])
    if not 0 < port < 65_536:
        raise NotAllowed("the port")
    path, query = normal_path(parts["path"]), escaped(parts["query"] or "", QUERY_SAFE)
    shown = host if port == PORTS[scheme] else f"{host}:{port}"
    return Target(f"{scheme}://{shown}{path}{query}", scheme, host, port, path)


def parse_s3(parts):
    """An S3 key is what is written, without escapes."""
    bucket, key = parts["authority"], parts["path"].removeprefix("/")
    if not BUCKET.fullmatch(bucket) or ".." in bucket or parts["query"] or "#" in parts.string:
        raise NotAllowed("the bucket")
    if key and not has_plain_segments(key):
        raise NotAllowed("the path")
    return Target(f"s3://{bucket}/{key}", "s3", bucket, None, key)


def normal_host(host):
    """A host name in lower case and ASCII, or an address as it is usually written, IPv6 in brackets."""
    if len(host) > 253:
        raise NotAllowed("the host")
    try:
        if host.startswith("["):
            return f"[{ipaddress.IPv6Address(host[1:-1])}]"
        if not host.isascii():
            host = idna.encode(host, uts46=True, std3_rules=True).decode()
    except (ValueError, idna.IDNAError) as e:
        raise NotAllowed("the host") from e
    host = host.lower()
    labels = host.split(".")
    if not all(map(LABEL.fullmatch, labels)):
        raise NotAllowed("the host")
    if NUMBER.fullmatch(labels[-1]):
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError as e:
            raise NotAllowed("the host") from e
    return host


def normal_path(path):
    path = escaped(path, PATH_SAFE) or "/"
    if re.search(r"%(?![0-9A-Fa-f]{2})", path) or not has_plain_segments(path[1:]):
        raise NotAllowed("the path")
    return ESCAPE.sub(normal_escape, path)


def escaped(text, safe):
    return urllib.parse.quote(text, safe=safe)


def normal_escape(match):
    character = chr(int(match[1], 16))
    return character if UNRESERVED.fullmatch(character) else match[0].upper()


def has_plain_segments(path):
    """Whether no server takes a part of the path for the way up or for nothing, however often it decodes it."""
    for _ in range(4):
        segments = [segment.partition(";")[0] for segment in re.split(r"[/\\]", path)]
        if {".", ".."} & set(segments) or "" in segments[:-1] or re.search(r"[\x00-\x1f\x7f\\]", path):
            return False
        path, before = urllib.parse.unquote(path, errors="replace"), path
        if path == before:
            return True
    return False


def begins(target, prefix):
    """Whether an allowed prefix is the beginning of a target."""
    any_subdomain = "://*." in prefix
    allowed = parse(prefix.replace("://*.", "://", 1))
    if (target.scheme, target.port) != (allowed.scheme, allowed.port):
        return False
    if any_subdomain and (is_address(target.host.strip("[]")) or not target.host.endswith("." + allowed.host)):
        return False
    if not any_subdomain and target.host != allowed.host:
        return False
    if not allowed.path or allowed.path.endswith("/"):
        return target.path.startswith(allowed.path)
    return target.path == allowed.path or target.path.startswith(allowed.path + "/")


def is_address(text):
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_allowed(address, private_networks):
    """Whether an address (text, as a resolver gives it) is one of the Internet's, or in one of private_networks."""
    try:
        address = plain(ipaddress.ip_address(address))
    except ValueError:
        return False
    networks = map(ipaddress.ip_network, private_networks)
    if any(address in network for network in networks if network.version == address.version):
        return True
    return (address.is_global and not address.is_multicast and not address.is_reserved
            and (address.version == 4 or address in UNICAST)
            and not any(address in network for network in MORE_PRIVATE if network.version == address.version))


def plain(address):
    """The IPv4 address that an IPv6 address stands for, if it does."""
    if address.version == 6:
        if address.ipv4_mapped:
            return address.ipv4_mapped
        if address in NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if address in TO_4:
            return ipaddress.IPv4Address(int(address) >> 80 & 0xFFFFFFFF)
    return address
