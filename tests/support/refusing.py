"""A server that refuses every connection with the message of a test: real ones say only what their state lets them."""

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_NEGOTIATION = {80877103, 80877104}  # SSLRequest, GSSENCRequest


@contextmanager
def postgresql(code: str, message: str, *, severity: str = "FATAL", more: str = "") -> Iterator[int]:
    """Answer every client of PostgreSQL with this error, as a server does that has not let it in; give the port.

    Args:
        code: SQLSTATE.
        severity: In the server's language.
        more: The detail.
    """
    with socket.create_server(("127.0.0.1", 0)) as door:
        threading.Thread(target=_refuse, args=(door, _error(code, message, severity, more)), daemon=True).start()
        yield door.getsockname()[1]


@contextmanager
def hanging_up() -> Iterator[int]:
    """Let clients connect, hear them, and say nothing; give the port."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        threading.Thread(target=_refuse, args=(door, b""), daemon=True).start()
        yield door.getsockname()[1]


def _refuse(door: socket.socket, answer: bytes) -> None:
    with suppress(OSError):
        while True:
            client, _ = door.accept()
            with client, suppress(OSError, struct.error):
                while _startup(client) in _NEGOTIATION:
                    client.sendall(b"N")
                client.sendall(answer)
                client.shutdown(socket.SHUT_WR)
                client.recv(1)


def _startup(client: socket.socket) -> int:
    length, code = struct.unpack("!ii", client.recv(8, socket.MSG_WAITALL))
    client.recv(length - 8, socket.MSG_WAITALL)
    return int(code)


def _error(code: str, message: str, severity: str, more: str) -> bytes:
    fields = {"S": severity, "V": "FATAL", "C": code, "M": message} | ({"D": more} if more else {})
    body = b"".join(f"{name}{value}\0".encode() for name, value in fields.items()) + b"\0"
    return b"E" + struct.pack("!i", len(body) + 4) + body
