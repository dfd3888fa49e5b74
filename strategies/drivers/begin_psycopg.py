"""psycopg 3: BEGIN travels with the first statement of a transaction.

The connection stays in the driver's own transaction mode, so nothing can run outside a transaction that would not have
done so before: a server-side cursor, COPY, `stream()`, `tpc_begin()` and whatever is not known here begin it as the
driver does, in a round trip of its own. Only `execute` and `executemany` of an ordinary statement on an idle
connection go another way: into a pipeline, where the driver's BEGIN is queued before the statement.

`Begins` and what goes with it serve the connections that are awaited too: `begin_awaited_psycopg`.

Tried with psycopg 3.3.9. What is private of psycopg here are three methods of `psycopg.BaseConnection`:
`_start_query`, where the driver sends BEGIN, `_exec_command` and `_get_tx_start_command`. Should `_start_query` be gone
from a later version, the driver begins the transaction itself and waits for the answer: a round trip more, as without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, ClassVar

import psycopg
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus

from ..interrupts import is_interrupt
from .along import Along
from .followed_psycopg import FollowedConnection
from .one_statement import is_one_statement

IDLE, IN_TRANSACTION = int(TransactionStatus.IDLE), int(TransactionStatus.INTRANS)
PIPELINE_OFF = int(psycopg.pq.PipelineStatus.OFF)


class Begins(psycopg.BaseConnection[Any]):
    """What a connection that can send BEGIN along with a statement does without waiting for anything."""

    ordinary: ClassVar[type[Begins]]
    """The class of such a connection."""
    sending: ClassVar[type[Begins]]
    """Its class while the first statement is being executed. A class of its own, so that all the other statements are
    executed by the driver's own methods, and cost what they cost without."""
    ending: ClassVar[type[Begins]]
    """Its class where a statement is to be sent together with the next COMMIT."""
    interrupted: BaseException | None = None
    """What has interrupted the sending of the first statement, or the waiting for its answer."""
    celery_alchemy_along: Along | None = None
    """What is to be sent with the first statement of the transaction, or is being sent with the COMMIT."""
    celery_alchemy_ending: Along | None = None
    """What is to be sent with the COMMIT."""

    def may_begin_along(self, query: object) -> bool:
        """Tell whether BEGIN may go with `query`, on a connection that is in no transaction."""
        return not self.autocommit and self.pgconn.pipeline_status == PIPELINE_OFF and is_one_statement(query)

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
        self.__class__ = self.ending
        return True

    def take_ending(self) -> bool:
        """Tell whether something is to be sent together with the COMMIT that is due now; the next one is ordinary."""
        ending, self.celery_alchemy_ending = self.celery_alchemy_ending, None
        self.__class__ = self.ordinary
        if ending is None or not ending.is_due() or self.pgconn.transaction_status != IN_TRANSACTION:
            return False
        self.celery_alchemy_along = ending
        return True

    def end_along(self) -> PQGen[None]:
        """Put what is to be sent with the COMMIT into the pipeline, and the COMMIT: `commit` would wait for its answer
        there."""
        yield from self._queue_along()
        yield from self._exec_command(b"COMMIT")

    def _queue_along(self) -> PQGen[None]:
        along = self.celery_alchemy_along
        if along is not None and along.is_due():
            along.sent = True
            text = psycopg.ClientCursor[Any](self).mogrify(along.query, along.values)  # type: ignore[call-overload]
            yield from self._exec_command(text.encode(self.info.encoding))


class SendsBegin(Begins):
    """The same while the first statement is being executed."""

    def _start_query(self) -> PQGen[None]:
        if self.pgconn.transaction_status != IDLE:
            yield from super()._start_query()
            return
        # As the driver does it, but without waiting for the answer: in a pipeline the command is only queued.
        yield from self._exec_command(self._get_tx_start_command())
        yield from self._queue_along()

    def gives_up(self, gen: PQGen[Any]) -> bool:
        """Tell whether nothing is waited for any more: leaving the pipeline would wait for the statement that was to be
        interrupted."""
        if self.interrupted is None:
            return False
        gen.close()
        return True


class Sending(contextlib.AbstractContextManager[None]):
    """A block in which a pipeline is open that begins with BEGIN, or ends with COMMIT.

    Raises:
        psycopg.Error: the server has refused the statement; its transaction has begun, and has failed.
    """

    __slots__ = ("_connection",)

    def __init__(self, connection: Begins) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.__class__ = self._connection.sending

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        connection = self._connection
        along, interrupted = connection.celery_alchemy_along, connection.interrupted
        connection.__class__ = connection.ordinary
        connection.interrupted = connection.celery_alchemy_along = None
        if isinstance(error, psycopg.Error):
            if along is not None and along.sent:
                along.failed(error)
            if interrupted is not None:
                # The pipeline cannot be left in the middle of an answer, and says so in an error that hides this one.
                raise interrupted from None


class Noting(contextlib.AbstractContextManager[None]):
    """A block whose interruption the connection notes."""

    __slots__ = ("_connection",)

    def __init__(self, connection: Begins) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and is_interrupt(error):
            self._connection.interrupted = error


class BeginningConnection(Begins, FollowedConnection):
    """A connection that can send BEGIN along with a statement; cursors of `beginning(...)` ask it to."""

    def send_along(self, work: Callable[[], object]) -> None:
        """Do `work`, which executes one statement, in a pipeline."""
        with Sending(self), self.pipeline(), Noting(self):
            work()

    def end(self) -> None:
        """Send the COMMIT, with what is to go with it."""
        with self.lock:
            self.wait(self.end_along())


class _SendingBegin(SendsBegin, BeginningConnection):
    def wait(self, gen: PQGen[Any], *args: Any, **kwargs: Any) -> Any:
        """Do what the driver's own does, and wait no more once it was interrupted."""
        if self.gives_up(gen):
            return None
        with Noting(self):
            return super().wait(gen, *args, **kwargs)


class _Ending(BeginningConnection):
    def commit(self) -> None:
        if self.take_ending():
            self.send_along(self.end)
        else:
            self.commit()  # the driver's: the class is another one now


BeginningConnection.ordinary, BeginningConnection.sending = BeginningConnection, _SendingBegin
BeginningConnection.ending = _Ending


class _Beginning(psycopg.Cursor[Any]):
    """The first statement of a transaction takes BEGIN along."""

    def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        connection: BeginningConnection = self.connection  # type: ignore[assignment]
        if connection.pgconn.transaction_status != IDLE or not connection.may_begin_along(query):
            return super().execute(query, params, **options)
        connection.send_along(partial(super().execute, query, params, **options))
        return self

    def executemany(self, query: Any, params_seq: Iterable[Any], **options: Any) -> None:
        connection: BeginningConnection = self.connection  # type: ignore[assignment]
        if connection.pgconn.transaction_status != IDLE or not connection.may_begin_along(query):
            return super().executemany(query, params_seq, **options)
        connection.send_along(partial(super().executemany, query, params_seq, **options))
        return None


@cache
def beginning(factory: Any, kind: Any = _Beginning) -> Any:
    """Return a class of cursors like `factory`, whose first statement of a transaction takes BEGIN along."""
    if factory in kind.__bases__:
        return kind
    return type(f"Beginning{factory.__name__}", (kind, factory), {})


def connect(stock: object, *args: Any, cursor_factory: Any = psycopg.Cursor, **kwargs: Any) -> Any:
    """Connect as `psycopg.connect` does, to a connection that begins along with the first statement."""
    return BeginningConnection.connect(*args, cursor_factory=beginning(cursor_factory), **kwargs)
