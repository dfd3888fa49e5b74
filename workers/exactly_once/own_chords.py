"""Chords with `result_backend = "alchemy://"`: the body is sent once, by the member that ends last.

A chord is a row of the table of completed tasks, with the results that it waits for and how many of them have not been
counted; each of these is a row too. The walk of a member whose own result is committed:

count      Its row is deleted, and the chord counts down, in one transaction: delivered again, it is not counted again.
           So each member costs the same, however large the chord is.
last       It finds none left: that transaction is rolled back. The results of all are read. The row of the chord is
           deleted, its own too, and the body, or the errbacks of a chord that has failed, put into the outbox, in one
           transaction. Killed before its COMMIT, it is not counted, and a copy of it is the last.
copy       It has been counted, or was not expected: it looks whether the results of all are there, as do the few that
           end before the last one.

The outbox keeps the message of a member until that is counted (`sending.kept`).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from celery import states
from celery.canvas import maybe_signature
from celery.exceptions import ChordError
from celery.result import ResultSet, result_from_tuple
from sqlalchemy import Table
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from ...strategies.engines.transient import is_transient
from ...strategies.features import completed_states
from ...strategies.features.completed_states import OF_CHORD
from ...strategies.features.completed_table import recorded_id
from ...strategies.features.on_event_loop import run_in_thread
from ...strategies.scope import runs_in_greenlet
from ..apps import Served
from ..crossing import crossing
from ..pausing import pause
from ..sending import outbox
from ..sending.enqueue import register
from .ids import fix_errbacks
from .rows import Rows

logger: logging.Logger = logging.getLogger(__name__)
T = TypeVar("T")

TRIES = 20
"""Of a small transaction: the members of a chord that end at the same time all change its row."""


LOOK_TOO = 16
"""The last members look at the results of all, too: so many may have been lost before they were counted, with messages
that were acknowledged early."""


class _LastOne(Exception):
    """Rolls back the transaction of the member that nobody comes after."""


def begin(connection: Connection, table: Table, result: Any, members: str) -> None:
    """Write down a chord.

    Args:
        result: Of its header.
        members: The same, encoded.
    """
    ids = dict.fromkeys(map(recorded_id, leaves(result)))
    completed_states.expect(connection, table, recorded_id(str(result.id)), members, ids)


class Begun(outbox.Beginning):
    """A chord whose header waits for a COMMIT: it is written down there, or before the first member that does not
    wait. A member that ends earlier would not be counted."""

    def __init__(self, db: Served, result: Any, members: str) -> None:
        self._rows, self._result, self._members = Rows(db), result, members

    def stored(self) -> Sequence[outbox.Stored]:
        return ()

    def write(self, connection: Connection) -> None:
        begin(connection, self._rows.table, self._result, self._members)

    def __call__(self) -> None:
        if runs_in_greenlet() and not self._rows.side.strategy.awaits:
            run_in_thread(self._write_at_once)  # a statement in the body of a coroutine would stop its event loop
        else:
            self._write_at_once()

    def _write_at_once(self) -> None:
        self._rows.run(lambda connection, table: begin(connection, table, self._result, self._members))


def leaves(result: Any) -> list[str]:
    """Return the ids of the tasks whose results make up `result`, however deep it is."""
    inner = getattr(result, "results", None)
    if inner is None:
        return [result.id]
    return [task_id for one in inner for task_id in leaves(one)]


def returned(db: Served, backend: Any, request: Any) -> None:
    """Count the member `request` of a chord; send the body, or the errbacks, where it is the last."""
    rows, group_id = Rows(db), recorded_id(str(request.group))

    def count(connection: Connection, table: Table) -> int | None:
        left = completed_states.count(connection, table, group_id, recorded_id(str(request.id)))
        if left is not None and left <= 0:
            raise _LastOne
        return left

    is_last = False
    try:
        left = _tried(lambda: rows.run(count))
    except _LastOne:
        left, is_last = None, True
    if left is not None and left > LOOK_TOO:
        return
    chord = rows.run(lambda connection, table: completed_states.states_of(connection, table, [group_id], OF_CHORD))
    if group_id not in chord:
        return  # its body has been sent, or it has failed
    deps = result_from_tuple(backend.decode(chord[group_id].result)["members"], app=backend.app)
    if is_last or _are_there(backend, leaves(deps)):
        _finish(db, rows.table, backend, deps, request.chord)


def _are_there(backend: Any, ids: Sequence[str]) -> bool:
    return len(dict(backend.get_many(list(ids), interval=0, max_iterations=1))) == len(set(ids))


def _finish(db: Served, table: Table, backend: Any, deps: Any, body: Any) -> None:
    """Send the body of a chord whose members are all there, or what its failure calls; nothing where another member has
    done so."""
    callback = maybe_signature(body, app=backend.app)
    ids, group_id = leaves(deps), recorded_id(str(deps.id))
    try:
        values = _values(backend, deps)
    except Exception as error:
        logger.error("The chord %s failed: %r", deps.id, error)
        failure = error if isinstance(error, ChordError) else ChordError(repr(error))
        if failure is not error:
            failure.__cause__ = error
        fix_errbacks(callback)
        # Stores the results that have failed with it, and calls errbacks here that ask for the request: those may be
        # called again. What it sends has ids of its own, and goes into the transaction that ends the chord.
        if db.settings.outbox:
            with outbox.collected() as found:
                backend.chord_error_from_stack(callback, failure)
            _claim(db, table, group_id, ids, lambda: found)
        elif _is_there(db, group_id):
            backend.chord_error_from_stack(callback, failure)
            _claim(db, table, group_id, ids, list)
        return

    def send() -> list[outbox.Stored]:
        if not db.settings.outbox:
            callback.delay(values)  # before the row is gone: killed in between, it is sent again, under the same id
            return []
        with outbox.collected() as found:
            callback.delay(values)
        return found

    _claim(db, table, group_id, ids, send)


def _is_there(db: Served, group_id: str) -> bool:
    return bool(
        Rows(db).run(lambda connection, table: completed_states.states_of(connection, table, [group_id], OF_CHORD))
    )


def _values(backend: Any, deps: Any) -> list[Any]:
    """Return what the members have returned, in their order.

    Raises:
        ChordError: one of them has failed.
    """
    timeout = backend.app.conf.result_chord_join_timeout
    if any(isinstance(one, ResultSet) for one in deps.results):
        try:
            # Not in `allow_join_result`, a flag of the process: a chord that ends in another thread resets it.
            return list(deps.join(timeout=timeout, propagate=True, disable_sync_subtasks=False))
        except Exception as error:
            failed = next((one for one in deps.results if getattr(one, "failed", lambda: False)()), None)
            if failed is None:
                raise
            raise _error(failed.id, error) from error
    found = dict(backend.get_many([one.id for one in deps.results], timeout=timeout))
    values = []
    for one in deps.results:
        if found[one.id]["status"] in states.PROPAGATE_STATES:
            raise _error(one.id, found[one.id]["result"])
        values.append(found[one.id]["result"])
    return values


def _error(task_id: str, error: Any) -> ChordError:
    found = ChordError(f"Dependency {task_id} raised {error!r}")
    found.__cause__ = error if isinstance(error, BaseException) else None
    return found


def _claim(
    db: Served, table: Table, group_id: str, ids: Sequence[str], send: Callable[[], Sequence[outbox.Stored]]
) -> None:
    """Delete the chord's rows, and put into the outbox what `send` returns, in one transaction, where no other member
    has done so."""
    _tried(lambda: _claim_once(db, table, group_id, ids, send))


@crossing
def _claim_once(
    db: Served, table: Table, group_id: str, ids: Sequence[str], send: Callable[[], Sequence[outbox.Stored]]
) -> None:
    with db.unit_of_work() as session:
        if not completed_states.finish(session.connection(), table, group_id, map(recorded_id, ids)):
            return
        found = send()
        for message in found:
            register(db, message)
        if found:
            outbox.watch(db, session)


def _tried(work: Callable[[], T]) -> T:
    """Return what `work` does, which is a transaction of its own, again where the server rolls it back for another."""
    for left in reversed(range(TRIES)):
        try:
            return work()
        except DBAPIError as error:
            if not left or not is_transient(error):
                raise
            pause(random.uniform(0, 0.05))  # noqa: S311 - no secret
    raise AssertionError
