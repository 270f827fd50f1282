"""Fetches a file of known hash, with progress, time-outs and retries; never leaves a broken file in place."""
import hashlib
import http.client
import logging
import os
import tempfile
import time
import urllib.error
import urllib.request

from app.config import StartError
from app.prepare.bundles import sha256

ATTEMPTS = 3
TIMEOUT_S = 5  # to connect, and between two pieces
PIECE = 1 << 18

log = logging.getLogger(__name__)


class DownloadError(StartError):
    """A file that cannot be downloaded; the message is one line."""


def fetch(url, path, sha256_prefix, has_just_failed=False):
    """Download url to path, unless the file is already there and intact. Returns its SHA-256.

    sha256_prefix: the first hexadecimal digits that the SHA-256 must have (torchvision's file names carry eight);
    has_just_failed: whether one attempt is enough. Raises DownloadError.
    """
    if path.exists():
        digest = sha256(path)
        if digest.startswith(sha256_prefix):
            return digest
        log.warning("%s is damaged: downloading it again", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(1 if has_just_failed else ATTEMPTS):
        if attempt:
            time.sleep(0.5 * attempt)
        try:
            return fetch_once(url, path, sha256_prefix)
        except urllib.error.HTTPError as e:
            reason = f"HTTP status {e.code}"
            if e.code < 500:
                break
        except (OSError, http.client.HTTPException, DownloadError) as e:
            reason = str(getattr(e, "reason", e)) or type(e).__name__
    raise DownloadError(f"{url} cannot be downloaded: {reason}")


def fetch_once(url, path, sha256_prefix):
    request = urllib.request.Request(url, headers={"User-Agent": "image-classifier"})
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as f, urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            total = int(response.headers.get("Content-Length") or 0)
            digest, done, shown = hashlib.sha256(), 0, -1
            while piece := response.read(PIECE):
                f.write(piece)
                digest.update(piece)
                done += len(piece)
                percent = 100 * done // total if total else 0
                if percent // 10 > shown:
                    shown = percent // 10
                    log.info("%s: %.0f of %.0f MiB (%d %%)", path.name, done / 2**20, total / 2**20, percent)
            f.flush()
            os.fsync(f.fileno())
        if total and done != total:
            raise DownloadError(f"the connection ended after {done} of {total} bytes")
        if not digest.hexdigest().startswith(sha256_prefix):
            raise DownloadError(f"its SHA-256 begins with {digest.hexdigest()[:8]}, expected {sha256_prefix}")
        os.chmod(partial, 0o644)
        os.replace(partial, path)
        return digest.hexdigest()
    finally:
        if os.path.exists(partial):
            os.unlink(partial)
