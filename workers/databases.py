"""The databases of an app: an Alchemy for each, one of them the default."""

from __future__ import annotations

import difflib

from ..strategies.several.servers import can_prepare
from . import apps
from .errors import ConfigurationError
from .settings import DEFAULT


class Databases(dict[str, apps.Served]):
    """The Alchemy of each database of an app, by the database's name."""

    def __missing__(self, name: object) -> apps.Served:
        near = difflib.get_close_matches(str(name), self, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigurationError(
            f"{name!r} is not a database of this app.{hint} Known: {', '.join(self)}. Add it to alchemy_databases, or "
            f"make it with Alchemy(app, database={name!r}, engine=engine)."
        )


def databases_of(db: apps.Served) -> Databases:
    """Return all databases of the app of `db`: the default first, then the others in the order of their COMMITs.

    Those that `alchemy_databases` names, and nobody has made an Alchemy for, are made now; nothing is connected.
    """
    app = db.app
    if app is None:
        return Databases({db.database: db})
    default = apps.find(app) or db
    declared = default.settings.databases
    with default.lock:
        for name in declared:
            if name not in apps.databases(app) and name != DEFAULT:
                # A Session class of the user's own is meant for all; a sessionmaker may be bound to one Engine.
                factory = default.session_factory if isinstance(default.session_factory, type) else None
                type(default)(app, database=name, session_factory=factory)
    known = apps.databases(app)
    names = dict.fromkeys([DEFAULT, *declared, *known])
    found = Databases({name: known[name] for name in names if name in known})
    for position, one in enumerate(found.values()):
        one.units.position = position
    return found


def database(db: apps.Served, name: str) -> apps.Served:
    """Return the Alchemy of the database `name` of the app of `db`; called for every use of one.

    Raises:
        ConfigurationError: there is none.
    """
    found = apps.databases(db.app).get(name) if db.app is not None else None
    return found if found is not None else databases_of(db)[name]


def check_two_phase(databases: Databases) -> None:
    """Refuse two-phase commit where databases could not agree.

    Raises:
        ConfigurationError: more than one of them has no two-phase commit.
    """
    unable = [
        name
        for name, db in databases.items()
        if db.settings.two_phase and not can_prepare(db.strategy.engines.url.get_dialect())
    ]
    if len(unable) > 1:
        raise ConfigurationError(
            f"alchemy_two_phase is True, but {' and '.join(map(repr, unable))} cannot prepare a transaction. One such "
            f"database can commit between the others' two phases; two cannot agree."
        )
