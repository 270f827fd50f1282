"""A web server that sends exactly the bytes that a test says, as fast or slowly as it says."""
import contextlib
import socket
import threading
import time

from servers import free_port


class HostileServer:
    """answers: {path: what to send}, as bytes or as a function of the connection; requests: [the bytes of each]."""

    def __init__(self, answers=None, tls=None, host="127.0.0.1", port=None):
        self.answers, self.requests = dict(answers or {}), []
        self.port, self.tls = port or free_port(), tls
        self.listener = socket.create_server((host, self.port))
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.port}"
        self.closed = threading.Event()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.enter_context(connection)
            if self.tls:
                connection = stack.enter_context(self.tls.wrap_socket(connection, server_side=True))
            received = b""
            while b"\r\n\r\n" not in received:
                piece = connection.recv(65_536)
                if not piece:
                    return
                received += piece
            head, _, body = received.partition(b"\r\n\r\n")
            length = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-l")]
            while length and len(body) < length[0]:
                piece = connection.recv(65_536)
                if not piece:
                    return
                body += piece
            self.requests.append(head + b"\r\n\r\n" + body)
            answer = self.answers[head.split()[1].decode()]
            if callable(answer):
                answer(connection, self.closed)
            else:
                connection.sendall(answer)

    def close(self):
        self.closed.set()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # ends `accept` too
        self.listener.close()


def ok(body=b"", *headers):
    """A whole answer."""
    return b"\r\n".join([b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), *headers, b"", body])


def repeatedly(start, piece, every_s=0.0):
    """An answer without an end."""
    def send(connection, closed):
        connection.sendall(start)
        while not closed.is_set():
            connection.sendall(piece)
            time.sleep(every_s)
    return send
