"""`result_backend = "alchemy://"`: results are read from the table of completed tasks.

SUCCESS of a task with `exactly_once` is seen if and only if its work is committed: it is the same row. States, failures
and the results of other tasks are kept beside it.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

from celery import states
from celery.backends.base import KeyValueStoreBackend
from kombu.utils.encoding import bytes_to_str
from sqlalchemy import Table
from sqlalchemy.engine import Connection

from ...strategies.asynchronous.strategy import PerLoopStrategy
from ...strategies.features import completed_states
from ...strategies.features.completed import Record
from ...strategies.features.completed_states import OF_GROUP, OF_TASK, is_state
from ...strategies.features.completed_table import recorded_id
from ...strategies.scope import runs_in_greenlet
from .. import apps
from ..sending import outbox
from ..sending.enqueue import register, session_with_outbox, waits
from . import own_chords
from .encoding import decode, is_storable
from .rows import Result, Rows
from .sends import waits_here

_BASE64 = "base64"


class AlchemyBackend(KeyValueStoreBackend):  # type: ignore[misc]
    """Results in the default database of the app's Alchemy. What waits for a result asks again and again."""

    persistent: bool = True
    supports_autoexpire: bool = False

    def __init__(self, app: Any = None, url: str | None = None, **keywords: Any) -> None:
        super().__init__(app=app, url=url or "alchemy://", **keywords)

    def as_uri(self, include_password: bool = False) -> str:
        """Return the URL."""
        return "alchemy://"

    def get(self, key: Any) -> Any:
        """Return what is stored for `key`, encoded; None where nothing is."""
        return self.mget([key])[0]

    def mget(self, keys: Iterable[Any]) -> list[Any]:
        """Return what is stored for each of `keys`."""
        keys = list(keys)
        places = [self._place_of(key) for key in keys]
        found: dict[tuple[str, int], Record] = {}

        def look(connection: Connection, table: Table) -> None:
            for kind in {kind for _, kind in places}:
                ids = [name for name, one in places if one == kind]
                known = completed_states.states_of(connection, table, ids, kind)
                found.update({(name, kind): record for name, record in known.items()})

        self._run(look)
        return [self._stored(self._strip_prefix(key), found.get(at)) for key, at in zip(keys, places, strict=True)]

    def set(self, key: Any, value: Any) -> None:
        """Store `value` for `key`."""
        name, kind = self._place_of(key)
        if isinstance(value, str) and is_storable(value):
            record = Record("text", value)
        else:
            encoded = value.encode("utf-8") if isinstance(value, str) else value
            record = Record(_BASE64, base64.b64encode(encoded).decode("ascii"))
        self._run(lambda connection, table: completed_states.put(connection, table, name, kind, record))

    def delete(self, key: Any) -> None:
        """Forget what is stored for `key`; not that a task has completed: `db.forget` does that."""
        self._run(lambda connection, table: completed_states.drop(connection, table, *self._place_of(key)))

    def cleanup(self) -> None:
        """Delete the states that are older than `result_expires`."""
        if self.expires:
            self._run(lambda connection, table: completed_states.drop_old(connection, table, float(self.expires)))

    def apply_chord(self, header_result_args: Any, body: Any, **keywords: Any) -> None:
        """Write down a chord whose header is about to be sent: with the COMMIT, where the header waits for one."""
        if not self.begins_here(header_result_args):
            self.begin_chord(header_result_args)

    def begins_here(self, header_result_args: Any) -> bool:
        """Write down a chord where that blocks no event loop, and must not be left to another thread, which does not
        see the unit of work that is open here; tell whether it is."""
        db = apps.get(self.app)
        if outbox.collecting.get() is not None and db.units.is_open():
            own_chords.begin(db.units.current().session.connection(), Rows(db).table, *self._begun(header_result_args))
            return True
        waiting = bool(db.settings.outbox) and (waits(db, None, None, {}) or waits_here(db))
        if waiting and (session := session_with_outbox(db)) is not None:
            register(db, own_chords.Begun(db, *self._begun(header_result_args)))
            outbox.watch(db, session)
            return True
        if isinstance(db.strategy, PerLoopStrategy) and runs_in_greenlet():
            self.begin_chord(header_result_args)
            return True
        return False

    def begin_chord(self, header_result_args: Any) -> None:
        """Write down a chord in a transaction of its own."""
        begun = self._begun(header_result_args)
        self._run(lambda connection, table: own_chords.begin(connection, table, *begun))

    def _begun(self, header_result_args: Any) -> tuple[Any, str]:
        """Return the result of a chord's header, and the same encoded."""
        header = self.app.GroupResult(*header_result_args)
        return header, bytes_to_str(self.encode({"members": header.as_tuple()}))

    def on_chord_part_return(self, request: Any, state: Any, result: Any, **keywords: Any) -> None:
        """A member of a chord has ended, and its result is stored: send the body where it was the last."""
        if not request.group or not request.chord:
            return
        db = apps.get(self.app)
        try:
            own_chords.returned(db, self, request)
        finally:
            self._let_go(db)

    def __reduce__(self, args: Any = (), kwargs: Any = None) -> Any:
        return super().__reduce__(args, {**(kwargs or {}), "url": "alchemy://"})

    def _place_of(self, key: Any) -> tuple[str, int]:
        text = bytes_to_str(key)
        kind = OF_GROUP if text.startswith(bytes_to_str(self.group_keyprefix)) else OF_TASK
        return recorded_id(self._strip_prefix(key)), kind

    def _stored(self, task_id: str, record: Record | None) -> Any:
        if record is None:
            return None
        if not is_state(record):
            value = decode(self.app, record)
            meta = self._get_result_meta(result=value, state=states.SUCCESS, traceback=None, request=None)
            done_at = datetime.fromtimestamp(record.completed_at, UTC).isoformat()
            meta |= {"task_id": task_id, "date_done": done_at, "children": []}  # else those of the task that reads
            return self.encode(meta)
        return base64.b64decode(record.result or "") if record.content_type == _BASE64 else record.result

    def _run(self, work: Callable[[Connection, Table], Result]) -> Result:
        db = apps.get(self.app)
        try:
            return Rows(db).run(work)
        finally:
            self._let_go(db)

    def _let_go(self, db: Any) -> None:
        if db.strategy.worker_pool.in_main_process:
            db.strategy.dispose()  # prefork's main process keeps no connection that a child would inherit
