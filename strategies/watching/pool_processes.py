"""How prefork's main process asks its pool processes what they are doing, even one that is stuck in a query.

A pair of sockets for each pool process, made before the fork, and in the pool process a thread that waits on its own:
it costs nothing until a question comes. There is no file, no name and no shared memory. A pool process that is spawned
inherits nothing: it connects to a socket in a directory that only this user may enter.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

logger: logging.Logger = logging.getLogger(__name__)

REPORT, RECYCLE = b"report\n", b"recycle\n"
ANSWER_WITHIN_S = 1.0
"""A pool process whose answer takes longer is left out: another thread may hold its interpreter."""


class PoolProcesses:
    """The main process's side: the sockets to its pool processes."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []
        self._next: tuple[socket.socket, socket.socket] | None = None
        self._door: socket.socket | None = None
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._lock = threading.Lock()

    def before_fork(self) -> None:
        """Make the sockets of the pool process that is about to be forked."""
        self.after_fork_in_parent()
        self._next = socket.socketpair()

    def after_fork_in_parent(self) -> None:
        """Keep this side of the sockets that the last fork has taken along."""
        if self._next is not None:
            ours, theirs = self._next
            self._next = None
            theirs.close()
            self._sockets.append(ours)

    def in_child(self, answer: Callable[[bytes], dict[str, Any]]) -> None:
        """Begin to answer, in the pool process that was forked since `before_fork`."""
        pair, self._next = self._next, None
        for other in self._sockets:
            other.close()  # of its siblings; that one has ended is seen by the end of its socket
        self._sockets.clear()
        if pair is not None:
            ours, theirs = pair
            ours.close()
            _answer_in_a_thread(theirs, answer)

    def open_door(self) -> str | None:
        """Let pool processes that are spawned connect; return where.

        None, with a warning, where there can be no such place: no directory for temporary files can be written to, or
        its name is longer than 107 characters. They are not asked then; the worker does without.
        """
        door = socket.socket(socket.AF_UNIX)
        try:
            self._directory = tempfile.TemporaryDirectory(prefix="celery-alchemy-", ignore_cleanup_errors=True)
            address = os.path.join(self._directory.name, "ask")
            door.bind(address)
            door.listen(128)
        except OSError as error:
            logger.warning("celery inspect sessions will show no spawned pool process: no socket (%s)", error)
            door.close()
            self._remove_directory()
            return None
        door.setblocking(False)
        self._door = door
        return address

    def _remove_directory(self) -> None:
        directory, self._directory = self._directory, None
        if directory is not None:
            directory.cleanup()

    def come_in(self, address: str, answer: Callable[[bytes], dict[str, Any]]) -> None:
        """Begin to answer, in a pool process that was spawned, at the `address` that `open_door` has returned."""
        theirs = socket.socket(socket.AF_UNIX)
        try:
            theirs.connect(address)
        except OSError as error:
            theirs.close()
            logger.warning("celery inspect sessions will not show this pool process (%s: %s)", address, error)
            return
        _answer_in_a_thread(theirs, answer)

    def _let_in(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._door is not None:
                self._sockets.append(self._door.accept()[0])

    def ask(self, question: bytes) -> list[dict[str, Any]]:
        """Return the answers of all pool processes that are alive."""
        self.after_fork_in_parent()
        with self._lock:
            self._let_in()
            asked = [one for one in self._sockets if self._send(one, question)]
            deadline = time.monotonic() + ANSWER_WITHIN_S
            found = [answer for one in asked if (answer := self._receive(one, deadline)) is not None]
        return sorted(found, key=lambda answer: int(answer["pid"]))

    def close(self) -> None:
        """Ask no more."""
        self.after_fork_in_parent()
        door, self._door = self._door, None
        if door is not None:
            door.close()
        self._remove_directory()
        for one in self._sockets:
            one.close()
        self._sockets.clear()

    def _send(self, one: socket.socket, question: bytes) -> bool:
        try:
            _drain(one)
            one.sendall(question)
        except OSError:
            self._forget(one)
            return False
        return True

    def _receive(self, one: socket.socket, deadline: float) -> dict[str, Any] | None:
        received = b""
        while not received.endswith(b"\n"):
            if not _is_readable(one, deadline - time.monotonic()):
                return None
            try:
                part = one.recv(65536)
            except OSError:
                part = b""
            if not part:
                self._forget(one)
                return None
            received += part
        try:
            answer: dict[str, Any] = json.loads(received.splitlines()[-1])
            int(answer["pid"])
        except (ValueError, TypeError, LookupError):
            self._forget(one)  # what writes there is no pool process of ours
            return None
        return answer

    def _forget(self, one: socket.socket) -> None:
        one.close()
        with contextlib.suppress(ValueError):
            self._sockets.remove(one)


def _drain(one: socket.socket) -> None:
    """Throw away an answer that came too late for its question."""
    while _is_readable(one, 0):
        if not one.recv(65536):
            raise ConnectionResetError


def _is_readable(one: socket.socket, wait_s: float) -> bool:
    if wait_s < 0:
        return False
    poller = select.poll()
    poller.register(one, select.POLLIN)
    return bool(poller.poll(wait_s * 1000))


def _answer_in_a_thread(theirs: socket.socket, answer: Callable[[bytes], dict[str, Any]]) -> None:
    threading.Thread(target=_answer, args=(theirs, answer), name="celery-alchemy-answers", daemon=True).start()


def _answer(theirs: socket.socket, answer: Callable[[bytes], dict[str, Any]]) -> None:
    # A soft time limit must interrupt what the main thread waits for, so it is delivered there.
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    with contextlib.suppress(OSError), theirs, theirs.makefile("rb") as questions:
        for question in questions:
            try:
                found = answer(question)
            except Exception as error:
                logger.exception("This pool process cannot tell what it is doing")
                found = {"error": f"{type(error).__name__}: {error}"}
            theirs.sendall(json.dumps({"pid": os.getpid(), **found}).encode() + b"\n")
