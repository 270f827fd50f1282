"""A client that sends as fast as it can, in a process that imports next to nothing."""
import contextlib
import itertools
import socket
import threading


def attack(port, head, piece):
    """Send a piece over and over, while a second thread reads what comes: there is always more to be read. Prints a
    line when it has begun."""
    with socket.create_connection(("127.0.0.1", port)) as s:
        s.sendall(head)
        threading.Thread(target=lambda: any(not s.recv(2**20) for _ in iter(int, 1)), daemon=True).start()
        with contextlib.suppress(OSError):
            for number in itertools.count():
                s.sendall(piece)
                if number == 3:
                    print("begun", flush=True)
