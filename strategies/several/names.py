"""The names of two-phase transactions: by whom each is decided.

`alchemy/DATABASE/DECIDER/TOKEN`. DATABASE is what the app calls the database that the transaction is on. DECIDER is a
fingerprint of the database that decides: what the app calls it, and the server's own identity (`servers`), never the
text of a URL; or "-", where the transaction itself decides. TOKEN is what that server can be asked by.

A server takes 64 bytes (MySQL) or 199 (PostgreSQL).
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from ..names import is_plain

PREFIX = "alchemy/"
_ITSELF = "-"
_LONGEST_NAME = 16
"""Of a database in the name of a transaction."""


class Name(NamedTuple):
    """The name of a two-phase transaction."""

    database: str
    """The name of its database, as `short` makes it."""
    decider: str | None
    """The fingerprint of the database that decides; None: it is this one."""
    token: str

    def __str__(self) -> str:
        return f"{PREFIX}{self.database}/{self.decider or _ITSELF}/{self.token}"


def parse(name: str) -> Name | None:
    """Return what `name` says; None where it is no such name, or one of celery-alchemy before identities were asked of
    the servers, which had four parts."""
    parts = name.removeprefix(PREFIX).split("/")
    if not name.startswith(PREFIX) or len(parts) != 3:
        return None
    database, decider, token = parts
    return Name(database, None if decider == _ITSELF else decider, token)


def fingerprint(database: str, identity: str) -> str:
    """Return what tells a database from others: by its name in the app, and by its server's own identity."""
    return hashlib.sha256(f"{database}/{identity}".encode()).hexdigest()[:12]


def short(database: str) -> str:
    """Return the name of a database as it stands in the name of a transaction."""
    if len(database) <= _LONGEST_NAME and is_plain(database):
        return database
    return f"db~{hashlib.sha256(database.encode(errors='surrogatepass')).hexdigest()[:12]}"
