"""Which Alchemy serves which Celery app.

This room is below the Alchemy itself, so it knows of it only what it keeps.
"""

from __future__ import annotations

import weakref
from typing import Any

from celery import Celery

from ._celery import is_spawned
from .errors import ConfigurationError
from .settings import DEFAULT

ATTRIBUTE = "_celery_alchemy"
"""Of an app: the Alchemy of its default database, which every task request asks for."""
ALL = "_celery_alchemy_databases"
"""Of an app: the Alchemy of each database, by its name."""
#: An Alchemy, of one database; rooms above know its class.
Served = Any
_all: weakref.WeakSet[Any] = weakref.WeakSet()


def register(app: Celery, db: Served) -> None:
    """Let `db` serve its database of `app`; the app keeps it alive.

    Raises:
        ConfigurationError: another Alchemy serves it.
    """
    known = app.__dict__.setdefault(ALL, {})
    if known.setdefault(db.database, db) is not db:
        raise ConfigurationError(
            f"The Celery app {app.main!r} has an Alchemy for the database {db.database!r} already: use the one that is "
            f"there. One for another database has a name: Alchemy(app, database='reports')."
        )
    if db.database == DEFAULT:
        setattr(app, ATTRIBUTE, db)
    _all.add(db)
    _link(known)


def unregister(app: Celery, db: Served) -> None:
    """Let `db` serve `app` no longer."""
    known = databases(app)
    served = known.get(db.database)
    if served is not None and served is db:
        del known[served.database]
        served.units.default = None
        _link(known)
    if getattr(app, ATTRIBUTE, None) is db:
        delattr(app, ATTRIBUTE)


def databases(app: Celery) -> dict[str, Served]:
    """Return the Alchemy of each database of `app` that there is one for, by the database's name."""
    found: dict[str, Served] = app.__dict__.get(ALL, {})
    return found


def _link(known: dict[str, Served]) -> None:
    """Let the units of work of the default database be over all the others."""
    default = known.get(DEFAULT)
    for db in known.values():
        db.units.default = default.units if default is not None and db is not default else None
        db.refresh()


def every() -> list[Served]:
    """Return every Alchemy of this process that was given an app."""
    return list(_all)


def find(app: Celery) -> Served | None:
    """Return the Alchemy that serves `app`; None when none was initialised.

    A spawned pool process (`--pool-start-method spawn`) runs its tasks under a second app object, rebuilt from the
    first one's configuration; the Alchemy of the app with the same name serves it too.
    """
    db: Served | None = getattr(app, ATTRIBUTE, None)
    if db is not None:
        return db
    alike = [one for one in _all if one.app is not None and one.app.main == app.main and one.database == DEFAULT]
    if len(alike) == 1 and is_spawned() and app is not alike[0].app:
        setattr(app, ATTRIBUTE, alike[0])
        setattr(app, ALL, databases(alike[0].app))
        alike[0].attach(app)
        return alike[0]
    return None


def get(app: Celery) -> Served:
    """Return the Alchemy that serves `app`.

    Raises:
        ConfigurationError: none was initialised for it.
    """
    db = find(app)
    if db is None:
        raise ConfigurationError(f"A DatabaseTask has no database: {explain_none(app)}")
    return db


def explain_none(app: Celery) -> str:
    """Say why `app` has no Alchemy for its default database, and what to do."""
    others = ", ".join(map(repr, databases(app)))
    what = f"has an Alchemy for {others}, but none for its default database" if others else "has no Alchemy"
    return (
        f"the Celery app {app.main!r} {what}. Where the app is made, write `db = Alchemy(app)`, or `db.init_app(app)`."
    )
