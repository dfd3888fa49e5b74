"""Chords with `result_backend = "alchemy://"`: the body is sent once, by the member that ends last.

A chord is a row of the table of completed tasks, with the results that it waits for. Each member looks, when its own
result is committed, whether all are there: so the last one finds them, however many end at the same time. Who deletes
the chord's row sends the body; with an outbox in the same transaction. A member that is delivered again looks again.
"""

from __future__ import annotations

import logging
from typing import Any

from celery.canvas import maybe_signature
from celery.exceptions import ChordError
from celery.result import allow_join_result, result_from_tuple
from sqlalchemy import Table
from sqlalchemy.engine import Connection

from ...strategies.features import completed_states
from ...strategies.features.completed import Record
from ...strategies.features.completed_states import OF_CHORD
from ..apps import Served
from ..sending import outbox
from ..sending.enqueue import register

logger: logging.Logger = logging.getLogger(__name__)


def begin(connection: Connection, table: Table, group_id: str, members: str) -> None:
    """Write down a chord.

    Args:
        members: Its results, encoded.
    """
    completed_states.put(connection, table, group_id, OF_CHORD, Record("text", members))


def waiting_for(connection: Connection, table: Table, group_id: str) -> str | None:
    """Return what `begin` has written; None: its body has been sent, or it has failed."""
    found = completed_states.states_of(connection, table, [group_id], OF_CHORD).get(group_id)
    return found.result if found is not None else None


def leaves(result: Any) -> list[str]:
    """Return the ids of the tasks whose results make up `result`, however deep it is."""
    inner = getattr(result, "results", None)
    if inner is None:
        return [result.id]
    return [task_id for one in inner for task_id in leaves(one)]


def finish(db: Served, table: Table, backend: Any, group_id: str, members: Any, body: Any) -> None:
    """Send the body of a chord whose members are all there, or its error; nothing where another member has done so."""
    app = backend.app
    callback = maybe_signature(body, app=app)
    deps = result_from_tuple(members, app=app)
    try:
        with allow_join_result():
            values = deps.join(timeout=app.conf.result_chord_join_timeout, propagate=True)
    except Exception as error:
        logger.error("The chord %s failed: %r", group_id, error)
        if _claim(db, table, group_id, lambda: None):
            backend.chord_error_from_stack(callback, _error(deps, error))
        return
    _claim(db, table, group_id, lambda: callback.delay(values))


def _claim(db: Served, table: Table, group_id: str, send: Any) -> bool:
    """Delete the chord's row, and call `send`, in one transaction; tell whether the row was there."""
    with db.unit_of_work() as session:
        if not completed_states.claim(session.connection(), table, group_id, OF_CHORD):
            return False
        if db.settings.outbox:
            with outbox.collected() as found:
                send()
            for message in found:
                register(db, message)
            if found:
                outbox.watch(db, session)
        else:
            # Before the row is gone: killed in between, it is sent again, under the same id.
            send()
        return True


def _error(deps: Any, error: Exception) -> ChordError:
    failed = [one for one in deps.results if getattr(one, "failed", lambda: False)()]
    found = ChordError(f"Dependency {failed[0].id} raised {error!r}" if failed else repr(error))
    found.__cause__ = error
    return found
