"""Bodies that are compressed, as Triton's client can send them. Imported with the first one."""
import io
import zlib

import gevent
from werkzeug.exceptions import RequestEntityTooLarge

from app.engine.slots import in_native_thread
from app.errors import ServiceError

WINDOW_BITS = {"gzip": 31, "deflate": 15}  # zlib's wbits; deflate means zlib's format in HTTP
STEP, PIECE = 2**18, 2**20  # bytes to give to zlib, and to take from it, at once


def expanded(body, encoding, most, deadline, bodies, key):
    """A received body without its Content-Encoding. most: bytes; bodies: uploads.Bodies, where it has this key. Raises
    ServiceError, HTTPException 413."""
    decoder, found = zlib.decompressobj(WINDOW_BITS[encoding]), io.BytesIO()
    bodies.receiving[key] = gevent.getcurrent()  # which is refused first if there is no memory for all
    try:
        for start in range(0, len(body), STEP):
            piece = body[start:start + STEP]
            if decoder.eof:
                raise damaged(encoding)
            while piece and not decoder.eof:
                deadline.check("read")
                more = in_native_thread(decoder.decompress, piece, PIECE)
                bodies.add(key, len(more))
                if found.tell() + len(more) > most:
                    raise RequestEntityTooLarge
                found.write(more)
                piece = decoder.unconsumed_tail
        found.write(decoder.flush())  # a few bytes, if the last piece was full
    except zlib.error as e:
        raise damaged(encoding) from e
    finally:
        bodies.receiving.pop(key, None)
    if not decoder.eof or decoder.unused_data:
        raise damaged(encoding)
    return found.getvalue()


def damaged(encoding):
    return ServiceError(400, "BAD_REQUEST", f"The body is not valid {encoding}: it is cut off, or more follows.")
