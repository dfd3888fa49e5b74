"""Which Alchemy serves which Celery app."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from celery import Celery

from .errors import ConfigurationError
from .settings import DEFAULT

if TYPE_CHECKING:
    from .extension import Alchemy

_ATTRIBUTE = "_celery_alchemy"
"""Of an app: the Alchemy of its default database, which every task request asks for."""
_ALL = "_celery_alchemy_databases"
"""Of an app: the Alchemy of each database, by its name."""
_all: weakref.WeakSet[Alchemy] = weakref.WeakSet()


def register(app: Celery, db: Alchemy) -> None:
    """Let `db` serve its database of `app`; the app keeps it alive.

    Raises:
        ConfigurationError: another Alchemy serves it.
    """
    known = app.__dict__.setdefault(_ALL, {})
    if known.setdefault(db.database, db) is not db:
        raise ConfigurationError(
            f"The Celery app {app.main!r} has an Alchemy for the database {db.database!r} already: use the one that is "
            f"there. One for another database has a name: Alchemy(app, database='reports')."
        )
    if db.database == DEFAULT:
        setattr(app, _ATTRIBUTE, db)
    _all.add(db)
    _link(known)


def unregister(app: Celery, db: Alchemy) -> None:
    """Let `db` serve `app` no longer."""
    known = databases(app)
    if known.get(db.database) is db:
        del known[db.database]
        db.units.leader = None
        _link(known)
    if getattr(app, _ATTRIBUTE, None) is db:
        delattr(app, _ATTRIBUTE)


def databases(app: Celery) -> dict[str, Alchemy]:
    """Return the Alchemy of each database of `app` that there is one for, by the database's name."""
    found: dict[str, Alchemy] = app.__dict__.get(_ALL, {})
    return found


def _link(known: dict[str, Alchemy]) -> None:
    """Let the units of work of the default database be over all the others."""
    default = known.get(DEFAULT)
    for db in known.values():
        db.units.leader = default.units if default is not None and db is not default else None


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
    alike = [one for one in _all if one.app is not None and one.app.main == app.main and one.database == DEFAULT]
    if len(alike) == 1 and _is_rebuilt(app, alike[0]):
        from .sending.enqueue import attach

        setattr(app, _ATTRIBUTE, alike[0])
        setattr(app, _ALL, databases(alike[0].app))
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
        raise ConfigurationError(f"A DatabaseTask has no database: {explain_none(app)}")
    return db


def explain_none(app: Celery) -> str:
    """Say why `app` has no Alchemy for its default database, and what to do."""
    others = ", ".join(map(repr, databases(app)))
    what = f"has an Alchemy for {others}, but none for its default database" if others else "has no Alchemy"
    return (
        f"the Celery app {app.main!r} {what}. Where the app is made, write `db = Alchemy(app)`, or `db.init_app(app)`."
    )
