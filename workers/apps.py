"""Which Alchemy serves which Celery app."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from celery import Celery

from .errors import ConfigurationError

if TYPE_CHECKING:
    from .extension import Alchemy

_ATTRIBUTE = "_celery_alchemy"
_all: weakref.WeakSet[Alchemy] = weakref.WeakSet()


def register(app: Celery, db: Alchemy) -> None:
    """Let `db` serve `app`; the app keeps it alive.

    Raises:
        ConfigurationError: another Alchemy serves it.
    """
    known = getattr(app, _ATTRIBUTE, None)
    if known is not None and known is not db:
        raise ConfigurationError(
            f"The Celery app {app.main!r} has an Alchemy already. Several databases are not available in this version: "
            f"use the one that is there."
        )
    setattr(app, _ATTRIBUTE, db)
    _all.add(db)


def unregister(app: Celery, db: Alchemy) -> None:
    """Let `db` serve `app` no longer."""
    if getattr(app, _ATTRIBUTE, None) is db:
        delattr(app, _ATTRIBUTE)


def every() -> list[Alchemy]:
    """Return every Alchemy of this process that was given an app."""
    return list(_all)


def find(app: Celery) -> Alchemy | None:
    """Return the Alchemy that serves `app`; None when none was initialised.

    A spawned pool process (`--pool-start-method spawn`) runs its tasks under a second app object, rebuilt from the
    first one's configuration; the Alchemy of the app with the same name serves it too.
    """
    db: Alchemy | None = getattr(app, _ATTRIBUTE, None)
    if db is not None:
        return db
    alike = [candidate for candidate in _all if candidate.app is not None and candidate.app.main == app.main]
    if len(alike) == 1 and _is_rebuilt(app, alike[0]):
        from .enqueue import attach

        setattr(app, _ATTRIBUTE, alike[0])
        attach(app)
        return alike[0]
    return None


def _is_rebuilt(app: Celery, db: Alchemy) -> bool:
    from celery.app import base

    return bool(base.USING_EXECV) and app is not db.app


def get(app: Celery) -> Alchemy:
    """Return the Alchemy that serves `app`.

    Raises:
        ConfigurationError: none was initialised for it.
    """
    db = find(app)
    if db is None:
        raise ConfigurationError(
            f"The Celery app {app.main!r} has no Alchemy, so a DatabaseTask of it has no database. Where the app is "
            f"made, write `db = Alchemy(app)`, or `db.init_app(app)`."
        )
    return db
