"""psycopg 3: BEGIN travels with the first statement of a transaction.

The connection stays in the driver's own transaction mode, so nothing can run outside a transaction that would not have
done so before: a server-side cursor, COPY, `stream()`, `tpc_begin()` and whatever is not known here begin it as the
driver does, in a round trip of its own. Only `execute` and `executemany` of an ordinary statement on an idle
connection go another way: into a pipeline, where the driver's BEGIN is queued before the statement.

Tried with psycopg 3.3.9. What is private of psycopg here are three methods of `psycopg.Connection`:
`_start_query`, where the driver sends BEGIN, `_exec_command` and `_get_tx_start_command`. Should `_start_query` be gone
from a later version, the driver begins the transaction itself and waits for the answer: a round trip more, as without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import psycopg
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus

from ..interrupts import is_interrupt
from .along import Along
from .followed_psycopg import FollowedConnection
from .one_statement import is_one_statement

IDLE, IN_TRANSACTION = int(TransactionStatus.IDLE), int(TransactionStatus.INTRANS)
PIPELINE_OFF = int(psycopg.pq.PipelineStatus.OFF)


class BeginningConnection(FollowedConnection):
    """A connection that can send BEGIN along with a statement; cursors of `beginning(...)` ask it to."""

    interrupted: BaseException | None = None
    """What has interrupted the sending of the first statement, or the waiting for its answer."""

    def may_begin_along(self, query: object) -> bool:
        """Tell whether BEGIN may go with `query`, on a connection that is in no transaction."""
        return not self.autocommit and self.pgconn.pipeline_status == PIPELINE_OFF and is_one_statement(query)

    celery_alchemy_along: Along | None = None
    """What is to be sent with the first statement of the transaction."""
    celery_alchemy_ending: Along | None = None
    """What is to be sent with the COMMIT."""

    def celery_alchemy_begin_with(self, along: Along) -> bool:
        """Send `along` together with the first statement that takes BEGIN along."""
        if self.pgconn.transaction_status != IDLE or self.autocommit:
            return False
        self.celery_alchemy_along = along
        return True

    def celery_alchemy_commit_with(self, along: Along) -> bool:
        """Send `along` together with the next COMMIT."""
        if self.pgconn.transaction_status != IN_TRANSACTION or self.pgconn.pipeline_status != PIPELINE_OFF:
            return False
        if getattr(self, "_num_transactions", 0) or getattr(self, "_tpc", None):
            return False  # the driver refuses that COMMIT
        self.celery_alchemy_ending = along
        self.__class__ = _Ending
        return True

    def _queue(self, along: Along) -> PQGen[None]:
        """Put `along` into the pipeline."""
        along.sent = True
        text = psycopg.ClientCursor(self).mogrify(along.query, along.values)
        yield from self._exec_command(text.encode(self.info.encoding))

    def send_begin_along(self, work: Callable[[], object]) -> None:
        """Do `work`, which executes one statement, in a pipeline that begins with BEGIN.

        Raises:
            psycopg.Error: the server has refused the statement; its transaction has begun, and has failed.
        """
        self.__class__ = _SendingBegin
        try:
            with self.pipeline():
                try:
                    work()
                except BaseException as error:
                    if is_interrupt(error):
                        self.interrupted = error
                    raise
        except psycopg.Error as error:
            along = self.celery_alchemy_along
            if along is not None and along.sent:
                along.failed(error)
            if self.interrupted is not None:
                # The pipeline cannot be left in the middle of an answer, and says so in an error that hides this one.
                raise self.interrupted from None
            raise
        finally:
            self.__class__ = BeginningConnection
            self.interrupted = self.celery_alchemy_along = None


class _SendingBegin(BeginningConnection):
    """The same connection while the first statement is being executed. A class of its own, so that all the other
    statements are executed by the driver's own methods, and cost what they cost without."""

    def _start_query(self) -> PQGen[None]:
        if self.pgconn.transaction_status != IDLE:
            yield from super()._start_query()
            return
        # As the driver does it, but without waiting for the answer: in a pipeline the command is only queued.
        yield from self._exec_command(self._get_tx_start_command())
        along = self.celery_alchemy_along
        if along is not None and along.is_due():
            yield from self._queue(along)

    def wait(self, gen: PQGen[Any], *args: Any, **kwargs: Any) -> Any:
        """Do what the driver's own does, and wait no more once it was interrupted."""
        if self.interrupted is not None:
            gen.close()  # leaving the pipeline would wait for the statement that was to be interrupted
            return None
        try:
            return super().wait(gen, *args, **kwargs)
        except BaseException as error:
            if is_interrupt(error):
                self.interrupted = error
            raise


class _Ending(BeginningConnection):
    """The same connection where a statement is to be sent together with the next COMMIT."""

    def commit(self) -> None:
        ending, self.celery_alchemy_ending = self.celery_alchemy_ending, None
        self.__class__ = BeginningConnection  # type: ignore[assignment]
        if ending is None or not ending.is_due() or self.pgconn.transaction_status != IN_TRANSACTION:
            psycopg.Connection.commit(self)
            return

        def work() -> None:
            with self.lock:
                self.wait(self._queue(ending))
                self.wait(self._exec_command(b"COMMIT"))  # `commit` would wait for its answer in the pipeline

        try:
            self.send_begin_along(work)
        except psycopg.Error as error:
            ending.failed(error)
            raise


class _Beginning(psycopg.Cursor[Any]):
    """The first statement of a transaction takes BEGIN along."""

    def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        connection: BeginningConnection = self.connection  # type: ignore[assignment]
        if connection.pgconn.transaction_status != IDLE or not connection.may_begin_along(query):
            return super().execute(query, params, **options)
        execute = super().execute
        connection.send_begin_along(lambda: execute(query, params, **options))
        return self

    def executemany(self, query: Any, params_seq: Iterable[Any], **options: Any) -> None:
        connection: BeginningConnection = self.connection  # type: ignore[assignment]
        if connection.pgconn.transaction_status != IDLE or not connection.may_begin_along(query):
            return super().executemany(query, params_seq, **options)
        executemany = super().executemany
        connection.send_begin_along(lambda: executemany(query, params_seq, **options))
        return None


@cache
def beginning(factory: Any) -> Any:
    """Return a class of cursors like `factory`, whose first statement of a transaction takes BEGIN along."""
    if factory is psycopg.Cursor:
        return _Beginning
    return type(f"Beginning{factory.__name__}", (_Beginning, factory), {})


def connect(*args: Any, cursor_factory: Any = psycopg.Cursor, **kwargs: Any) -> Any:
    """Connect as `psycopg.connect` does, to a connection that begins along with the first statement."""
    return BeginningConnection.connect(*args, cursor_factory=beginning(cursor_factory), **kwargs)
