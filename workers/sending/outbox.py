"""Messages that wait for a COMMIT, in the database instead of in memory.

The walk: `delay()` in a unit of work registers a message for its COMMIT, as without an outbox; it is captured as Celery
would publish it. Right before the COMMIT all those of the transaction are written, a row each. After it, the process
that committed sends them, its connection given back, and deletes their rows. Whatever it does not get to send,
`celery alchemy outbox run` sends, or any process that sends something of its own later.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from celery import Celery
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from ...strategies._sqlalchemy import is_autocommit
from ...strategies.features import outbox
from ...strategies.features.completed_table import recorded_id
from ...strategies.features.outbox_place import Place
from ...strategies.features.outbox_writing import Commit, Writer, explained, follow, listen
from ...strategies.hooks import OpenUnit, UnitHook
from ...strategies.sessions import owner_of, waiting_of
from ...strategies.unit_of_work import UnitOfWork
from ..apps import Served, find
from ..crossing import on_its_loop
from ..errors import BrokerGone, ConfigurationError, as_configuration_error
from ..settings import Settings
from . import kept, recording
from .broker import breaker_of, close_idle
from .capturing import Capture, capture
from .sender import Item, in_transaction, send_items, send_waiting, sends_until, table_of

__all__ = ["Delivery", "Outgoing", "Stored", "close_idle", "collected", "collecting", "send_waiting", "watch"]

logger: logging.Logger = logging.getLogger(__name__)

LEFTOVERS_EVERY_S = 10.0
"""A process that sends something of its own looks for what others have left this often."""
RELAY = "relay"
"""The value of `alchemy_outbox` with which only `celery alchemy outbox run` talks to the broker."""
#: Options of a call that are ours, or of no use any more when its message is sent.
_OURS = frozenset({"producer", "publisher", "connection", "result_cls", "add_to_parent"})


class Outgoing:
    """Waits for a COMMIT, and is written into the outbox right before it."""

    __slots__ = ()

    def stored(self) -> Iterable[Stored]:
        """Return the messages to write, in their order; called once, in the COMMIT. What it raises fails the COMMIT."""
        raise NotImplementedError

    def write(self, connection: Connection) -> None:
        """Write what belongs to the messages, in the COMMIT."""

    def __call__(self) -> None:
        """Send it: there was no transaction to write it into."""
        raise NotImplementedError


class Beginning(Outgoing):
    """What must be there before the messages of a canvas are. Calling it writes it at once."""

    __slots__ = ()


def begin_now(db: Served, options: Mapping[str, Any]) -> None:
    """Write what waits for the COMMIT of the unit of work here, and must be there before a message that is sent at
    once: one of `enqueue_on_commit=False`, in a canvas that waits.

    Args:
        options: Of the message.
    """
    units = _home(db).units
    if (options.get("chord") or options.get("chain")) and units.is_open():
        waiting = units.current().waiting
        for beginning in waiting.take(Beginning) if waiting is not None else ():
            beginning()


class Stored(Outgoing):
    """A message that waits for a COMMIT and is to be written down before it.

    Args:
        send: Celery's own `app.send_task`.
    """

    __slots__ = ("__weakref__", "_db", "call", "capture", "held", "result", "row")

    def __init__(
        self, db: Served, app: Celery, send: Callable[..., Any], name: str, args: Any, kwargs: Any,
        options: dict[str, Any], result: Any = None,
    ) -> None:  # fmt: skip
        options = {key: value for key, value in options.items() if key not in _OURS}
        self._db = _home(db)
        self.capture: Capture = capture(app, send, name, args, kwargs, options)
        publication = self.capture.publication
        nesting = kept.nesting_of(self._db, name, publication.headers)
        self.row: outbox.Message = outbox.Message(
            recorded_id(str(self.task_id)), name, publication.to_text(name), publication.expires_at, nesting
        )
        self.result: Any = result
        self.held: list[Delivery] | None = None
        """Takes what would send it after the COMMIT, where that is to come later."""
        self.call: tuple[Any, Any, dict[str, Any]] | None = (
            (args, kwargs, options) if recording.ATTRIBUTE in app.__dict__ else None
        )

    @property
    def task_id(self) -> str:
        """The id that the task will have."""
        return self.capture.task_id

    def stored(self) -> Iterable[Stored]:
        return (self,)

    def __call__(self) -> None:
        on_its_loop(self._db, self._store)

    def _store(self) -> None:
        with as_configuration_error(), self._db.unit_of_work() as session:
            self._db.units.current().on_commit(self)
            watch(self._db, session)
            session.begin()

    def __repr__(self) -> str:
        return f"sending {self.capture.name}[{self.task_id}]"


#: Set for the duration of `collected`: takes the messages that would be sent.
collecting: ContextVar[list[Stored] | None] = ContextVar("celery_alchemy_collecting", default=None)


@contextmanager
def collected() -> Iterator[list[Stored]]:
    """Yield a list that takes what the block sends, in place of the broker: for `Outgoing.stored`."""
    found: list[Stored] = []
    token = collecting.set(found)
    try:
        yield found
    finally:
        collecting.reset(token)


#: Which Engines are known to be of the database of an outbox, or not.
_places: weakref.WeakKeyDictionary[Any, Place] = weakref.WeakKeyDictionary()


def _place_of(db: Served) -> Place:
    table = table_of(db)
    place = _places.get(db)
    if place is None or place.table is not table:
        place = _places[db] = Place(table)
    return place


def _home(db: Served) -> Served:
    """Return the Alchemy of the database that the outbox is in: the app's default one."""
    return find(db.app) or db


def refuse_other_database(db: Served, session: Session) -> None:
    """Refuse a Session that is not of the outbox's database; one of asyncio that is not known yet, in its COMMIT.

    Raises:
        CeleryAlchemyError: a message could not be committed together with it.
    """
    db = _home(db)
    with as_configuration_error():
        place = _place_of(db)
        engine = place.engine_of(session)
        if not engine.dialect.is_async or place.is_known(session, db.engine):
            place.refuse_other(session, db.engine)


def watch(db: Served, session: Session) -> None:
    """Write what waits for the COMMIT of `session` into the outbox, last before it. Begins nothing."""
    db = _home(db)

    def waits() -> bool:
        waiting = waiting_of(session)
        return waiting is not None and waiting.has(Outgoing)

    def make() -> Writer:
        def write(connection: Connection, how: Commit) -> None:
            _write(db, session, connection, how)

        return Writer(session, table_of(db), write, waits)

    with as_configuration_error():
        writer = follow(session, make)
    writer.registered()


def _write(db: Served, session: Session, connection: Connection, how: Commit) -> None:
    """Write what waits for the COMMIT of `session`, in the transaction of `connection`."""
    waiting = waiting_of(session)
    assert waiting is not None
    stored: list[Stored] = []
    for outgoing in waiting.take(Outgoing):
        outgoing.write(connection)
        stored += outgoing.stored()
    if not stored:
        return
    if is_autocommit(connection):
        raise ConfigurationError(
            f"{stored[0].row.task} waits for a COMMIT in the outbox (alchemy_outbox), and the connection is in "
            f"AUTOCOMMIT: the work is committed by now, and would not be undone with the message. Leave "
            f"isolation_level='AUTOCOMMIT' (or the driver's autocommit) out, or send it with apply_async()."
        )
    if not isinstance(owner_of(session), UnitOfWork):
        _place_of(db).refuse_other(session, db.engine, connection)
    app = db.app
    assert app is not None
    relays = db.settings.outbox == RELAY or not breaker_of(app).lets_through
    delivers = how is not Commit.OTHERS or _is_of_test(session)
    lease_s = 0.0 if relays or not delivers else outbox.LEASE_S
    notify = not lease_s and how is not Commit.PREPARED
    table = table_of(db)
    with as_configuration_error():
        try:
            batch = outbox.write(connection, table, [one.row for one in stored], lease_s=lease_s, notify=notify)
        except DBAPIError as error:
            known = explained(error, connection, table)
            raise known from (error if known is not error else error.__cause__)
    if delivers:
        delivery, held = Delivery(db, batch, stored, sends=bool(lease_s)), stored[0].held
        waiting.add(delivery if held is None else functools.partial(held.append, delivery), None)


def _is_of_test(session: Session) -> bool:
    owner = owner_of(session)
    return isinstance(owner, UnitOfWork) and owner.strategy.shares_connection


class BeginForMessages(UnitHook):
    """Lets a unit of work that has done nothing in the database have a transaction, where messages wait for its
    COMMIT."""

    __slots__ = ()

    def before_commit(self, unit: OpenUnit) -> None:
        assert isinstance(unit, UnitOfWork)
        waiting = unit.waiting
        if waiting is not None and unit.commits and waiting.has(Outgoing) and not unit.session.in_transaction():
            unit.session.begin()


def hooks(settings: Settings) -> tuple[UnitHook, ...]:
    """Return what follows units of work for the outbox; nothing where it is off."""
    if not settings.outbox:
        return ()
    listen()  # now: with the first message, another thread or greenlet may be in the COMMIT of a Session
    return (_BEGIN,)


_BEGIN = BeginForMessages()


class Delivery:
    """Sends the messages of a transaction once it is committed.

    Args:
        sends: False: a sender does, and this only tells who listens that they are on their way.
    """

    __slots__ = ("_batch", "_db", "_sends", "_stored", "_until")

    def __init__(self, db: Served, batch: str, stored: list[Stored], *, sends: bool = True) -> None:
        self._db, self._batch, self._stored, self._sends = db, batch, stored, sends
        self._until = sends_until()

    def __call__(self) -> None:
        app = self._db.app
        for stored in self._stored:
            if stored.result is not None and (parent := app.current_worker_task):
                parent.add_trail(stored.result)
        if not self._sends:
            for stored in self._stored:
                stored.capture.published(app, None)
        elif recording.ATTRIBUTE in app.__dict__:
            self._record()
        elif _loop_runs():
            _background().submit(self._send_logged)  # the loop of a web application does not wait for the broker
        else:
            self.send()

    def _record(self) -> None:
        """Keep what would be sent, for a test that asks for it."""
        for stored in self._stored:
            args, kwargs, options = stored.call or ((), {}, {})
            recording.kept(self._db.app, stored.capture.name, args, kwargs, options)
        table = table_of(self._db)
        in_transaction(self._db, lambda session: outbox.drop(session, table, [table.c.batch == self._batch]))

    def send(self) -> None:
        """Send, and delete what was sent; no database connection is held while the broker is talked to."""
        items = [
            Item(
                (self._batch, position),
                stored.task_id,
                stored.capture.name,
                stored.capture.publication,
                stored.capture,
                kept=stored.row.nesting is not None,
            )
            for position, stored in enumerate(self._stored)
        ]
        try:
            send_items(self._db, items, self._until)
        except BrokerGone as error:
            logger.warning("%r could not be sent, and stay in the outbox: %s", self, error)
        except (DBAPIError, ConfigurationError) as error:
            logger.warning("%r: what was sent could not be deleted, and may be sent again: %s", self, error)
        else:
            _send_leftovers(self._db)

    def _send_logged(self) -> None:
        try:
            self.send()
        except Exception:
            logger.exception("%r could not be sent, and stay in the outbox", self)

    def __repr__(self) -> str:
        return f"batch {self._batch} of the outbox ({len(self._stored)} messages)"


_last_look = 0.0


def _send_leftovers(db: Served) -> None:
    global _last_look  # noqa: PLW0603 - once for all of the process
    now = time.monotonic()
    if now - _last_look >= LEFTOVERS_EVERY_S:
        _last_look = now
        try:
            send_waiting(db)
        except BrokerGone as error:
            logger.warning("What waits in the outbox could not be sent, and stays there: %s", error)


def _loop_runs() -> bool:
    """Tell whether this thread runs an event loop, which must not wait."""
    if "asyncio" not in sys.modules:
        return False
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


_executor: tuple[int, ThreadPoolExecutor] | None = None


def _background() -> ThreadPoolExecutor:
    """Return what sends for event loops: one thread of this process."""
    global _executor  # noqa: PLW0603 - once for all of the process
    if _executor is None or _executor[0] != os.getpid():
        _executor = os.getpid(), ThreadPoolExecutor(1, "celery-alchemy-outbox")
    return _executor[1]
