"""A request's body in pieces as they arrive. Imported with the first body that is answered while it does."""

SMALL_PIECE = 1024  # bytes to wait for of another server's body


class Arriving:
    """Reads a gunicorn.http.body.Body: its own `read` waits until it has all of the bytes that it is asked for, and
    copies what is left of a large piece for each small one that is taken from it. most: bytes of a piece."""

    def __init__(self, body, most):
        self.body, self.reader, self.most = body, getattr(body, "reader", None), most
        unreader = getattr(getattr(self.reader, "req", self.reader), "unreader", None)
        if unreader:
            unreader.max_body_chunk = most  # of one recv

    def read(self):
        """The bytes that have arrived, at least one, waiting for it if need be; b"" at the body's end. Raises what
        reading from the client does."""
        try:
            if hasattr(self.reader, "parser"):
                return self.of_chunks()
            if not hasattr(self.reader, "length"):
                return self.body.read(SMALL_PIECE)
            piece = self.body.read1(self.most)  # see worker.py
            if not piece and self.reader.length:
                raise ConnectionError("the client has left")
            return piece
        except Exception:
            self.body.failed = True  # where the next request begins is unknown
            raise

    def of_chunks(self):
        for piece in self.reader.parser or ():
            if piece:
                return piece
        self.reader.parser = None  # Gunicorn's mark of a body that has been read
        return b""
