"""A proxy between a database server and its clients that writes down what each of them says."""

from sqlalchemy import URL

from celery_alchemy.loadtests.services.proxy import Conversation, Proxy

GOODBYE = "<goodbye>"


class Recorder(Proxy):
    """A TCP proxy before a database server that writes down what each of its clients says.

    A socket that two processes share is one client: what a child says on its parent's connection is in the parent's
    record, and nowhere else.
    """

    def __init__(self, server: URL) -> None:
        self._parse = _postgresql if server.get_backend_name() == "postgresql" else _mysql
        self._said: dict[int, bytearray] = {}
        super().__init__(server)

    def heard(self, talk: Conversation, data: bytes, *, from_client: bool) -> None:
        """Write down what clients say."""
        if from_client:
            self._said.setdefault(talk.client_port, bytearray()).extend(data)

    def statements(self, client_port: int) -> list[str]:
        """Return the statements of the client with this local port; `GOODBYE` where it ended the conversation."""
        return self._parse(bytes(self._said[client_port]))


def _postgresql(stream: bytes) -> list[str]:
    found, position, greeted = [], 0, False
    while position + 5 <= len(stream):
        if not greeted:
            length = int.from_bytes(stream[position : position + 4])
            # Anything else before the start-up message asks for encryption.
            greeted = int.from_bytes(stream[position + 4 : position + 6]) == 3
            position += length
            continue
        kind, body = stream[position : position + 1], position + 5
        position += 1 + int.from_bytes(stream[position + 1 : position + 5])
        if kind == b"Q":
            found.append(stream[body : position - 1].decode())
        elif kind == b"P":
            found.append(stream[body:position].split(b"\0")[1].decode())
        elif kind == b"X":
            found.append(GOODBYE)
    return found


def _mysql(stream: bytes) -> list[str]:
    found, position = [], 0
    while position + 5 <= len(stream):
        length, number = int.from_bytes(stream[position : position + 3], "little"), stream[position + 3]
        command, text = stream[position + 4], stream[position + 5 : position + 4 + length]
        position += 4 + length
        if number:  # the greeting; every command starts at 0
            continue
        found.append({1: GOODBYE, 3: text.decode(errors="replace")}.get(command, f"<command {command}>"))
    return found
