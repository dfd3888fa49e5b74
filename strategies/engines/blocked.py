"""Statements that the main thread waits for inside C, where Python runs no signal handler.

psycopg2 and mysqlclient wait so. A soft time limit is a signal whose handler raises, and it would strike when the
statement returns. Python writes the number of each signal to a file descriptor at once, whatever the main thread does
(`signal.set_wakeup_fd`). A thread reads there, and stops the statement on the server: then the handler runs.

A wait of psycopg2's in Python (its wait callback) would do too, but psycopg2 refuses COPY and large objects then, and
each statement would pay for it. This costs a statement nothing.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
import time
import weakref

from sqlalchemy.pool import ConnectionPoolEntry

from .._sqlalchemy_pools import creator_of, pool_of
from ..drivers.base import CANCEL_TIMEOUT_S
from ..interrupts import shield
from ..scope import Scope, here
from . import forks
from .held import holding_of

logger: logging.Logger = logging.getLogger(__name__)

GRACE_S = 0.05
"""A handler that has not run for so long cannot run: the main thread is inside C."""


class BlockedStatements:
    """Stops the statement that the main thread waits for, when a signal has come whose handler cannot run."""

    def __init__(self) -> None:
        self._scope: Scope | None = None
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        self._handled = False
        """The handler has run since the thread has looked last."""
        self._stopping = threading.RLock()
        """Held while a statement is stopped: the request must not strike the next one."""
        self._stopped: weakref.WeakSet[ConnectionPoolEntry] = weakref.WeakSet()

    def watch(self, signum: int) -> None:
        """Stop the statements of this thread, the main one, when `signum` comes; once for each process.

        Does nothing where the code of the user has a use of its own for `signal.set_wakeup_fd`.
        """
        if self._sockets is not None:
            return
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        if previous != -1:
            signal.set_wakeup_fd(previous)
            reader.close()
            writer.close()
            logger.info("signal.set_wakeup_fd is in use: a soft time limit strikes when the statement has returned")
            return
        self._scope, self._sockets = here(), (reader, writer)
        shield.noticed = self._notice
        forks.on_fork(self._after_fork)
        threading.Thread(target=self._listen, args=(reader, signum), name="celery-alchemy-limits", daemon=True).start()

    def was_stopped(self, record: ConnectionPoolEntry | None) -> bool:
        """Tell, once, whether a statement was stopped on the connection of `record`."""
        if record is None or record not in self._stopped:
            return False
        self._stopped.discard(record)
        return True

    def _notice(self) -> None:
        """The handler runs. It waits until a request that is under way has done its work."""
        self._handled = True
        if self._stopping.acquire(timeout=CANCEL_TIMEOUT_S):
            self._stopping.release()

    def _listen(self, reader: socket.socket, signum: int) -> None:
        # The handler interrupts what the main thread waits for only where the signal is delivered there.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        with contextlib.suppress(OSError):
            while data := reader.recv(4096):
                if signum in data:
                    self._await_handler(signum)
                    self._handled = False
                    with contextlib.suppress(BlockingIOError):  # the same signal once more, handled with the first
                        reader.recv(4096, socket.MSG_DONTWAIT)

    def _await_handler(self, signum: int) -> None:
        asked: set[ConnectionPoolEntry] = set()
        time.sleep(GRACE_S)
        while not self._handled and shield.handles(signum):
            with self._stopping:
                # A COMMIT or a clean-up is not stopped: the limit waits for it anyway.
                if not self._handled and not shield.depth:
                    self._stop(asked)
            time.sleep(GRACE_S)

    def _stop(self, asked: set[ConnectionPoolEntry]) -> None:
        scope = self._scope
        for record in list(scope.held) if scope is not None else ():
            holding, dbapi_connection = holding_of(record), record.dbapi_connection
            if holding is None or dbapi_connection is None or record in asked:
                continue
            driver, pool = holding.watch.driver, pool_of(record)
            if not driver.waits_in_c or pool is None:
                continue
            asked.add(record)
            try:
                if driver.stop(dbapi_connection, holding.number, creator_of(pool)):
                    self._stopped.add(record)
            except Exception as error:
                logger.info("Could not stop on the server the statement that a time limit is for: %s", error)

    def _after_fork(self) -> None:
        """Nothing in the child listens, and its signals are no matter of the parent's."""
        sockets, self._sockets = self._sockets, None
        shield.noticed = None
        self._stopping, self._handled = threading.RLock(), False
        if sockets is not None:
            with contextlib.suppress(ValueError):
                signal.set_wakeup_fd(-1)
            for one in sockets:
                one.close()


blocked_statements: BlockedStatements = BlockedStatements()
