"""What is in the outbox, for `celery inspect sessions`, metrics and the commands."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any, cast

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from ...strategies.drivers.sqlite import in_memory
from ...strategies.errors import CeleryAlchemyError
from ...strategies.features.outbox import Counts, count
from ...strategies.watching.observer import harmless
from ..apps import Served
from ..crossing import crossing
from ..sending.sender import table_of
from . import observers

logger: logging.Logger = logging.getLogger(__name__)
#: What looks from outside, by what has made it.
_looking: weakref.WeakKeyDictionary[Any, Engine] = weakref.WeakKeyDictionary()

ANSWERS_WITHIN_S = 1.0
"""`celery inspect` waits two seconds for a worker; one that waits for its database must answer all the same."""


def engine_of(db: Served) -> Engine:
    """Return an Engine that keeps no connection, so that no task waits for a look; the user's own if there is one."""
    engines = db.strategy.engines
    if engines.user_engine is not None or in_memory(engines.url):
        return cast(Engine, db.engine)
    engine = _looking.get(engines)
    if engine is None:
        engine = _looking[engines] = engines.unpooled()
    return engine


@crossing
def counts(db: Served, engine: Callable[[Served], Engine]) -> Counts:
    """Return what is in the outbox, by a connection of the Engine that `engine(db)` returns."""
    with engine(db).connect() as connection:
        return count(connection, table_of(db))


def in_short(db: Served, within_s: float = ANSWERS_WITHIN_S) -> dict[str, Any] | None:
    """Return what is in the outbox, or why it cannot be told, as JSON; None where the app has none."""
    if not db.settings.outbox:
        return None
    found: list[dict[str, Any]] = []

    def look() -> None:
        try:
            found.append(as_json(counts(db, engine_of)) | {"error": None})
        except (SQLAlchemyError, CeleryAlchemyError) as error:
            found.append(_unknown(f"the outbox cannot be looked at: {type(error).__name__}"))

    # In a thread of its own: the worker's own goes on although the database does not answer.
    thread = threading.Thread(target=look, name="celery-alchemy-outbox", daemon=True)
    thread.start()
    thread.join(within_s)
    return found[0] if found else _unknown(f"the database does not answer within {within_s:g} s")


def _unknown(error: str) -> dict[str, Any]:
    """Return the shape of `as_json` where nothing is known."""
    return {"waiting": None, "sent": None, "set_aside": None, "oldest_s": None, "error": error}


def as_json(found: Counts) -> dict[str, Any]:
    """Return `found` as `inspect sessions` and `outbox list --json` show it."""
    oldest_s = None if found.oldest_s is None else round(found.oldest_s, 1)
    return {"waiting": found.waiting, "sent": found.sent, "set_aside": found.set_aside, "oldest_s": oldest_s}


def _own_engine(db: Served) -> Engine:
    engine: Engine = db.engine
    return engine


def tell(db: Served) -> None:
    """Tell the observer of this process, if it wants to know, what is in the outbox."""
    told: Any = getattr(observers.current(), "outbox", None)
    if told is None:
        return
    try:
        found = counts(db, _own_engine)
    except SQLAlchemyError as error:
        logger.warning("The outbox could not be counted for alchemy_metrics: %s", error)
        return
    with harmless():
        told(found.waiting, found.set_aside, found.oldest_s or 0.0)
