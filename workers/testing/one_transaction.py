"""One transaction for a test, around everything that an app does with its databases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from sqlalchemy.orm import Session

from ...strategies.errors import RollBack
from ...strategies.features.one_transaction import OneTransactionStrategy
from .. import apps
from ..errors import ConfigurationError


@contextmanager
def one_transaction(db: apps.Served) -> Iterator[Session]:
    """Let everything until the end of the block happen in one transaction for each database, and roll it back."""
    with ExitStack() as stack:
        for one in db.databases.values():
            stack.enter_context(_pinned(one))
        unit = db.units.begin(db.unit_options(commits=True), "the test", "block")
        try:
            yield unit.session
        finally:
            unit.fail(RollBack())  # drops what still waits for a commit of the test's own
            db.units.leave(unit)


@contextmanager
def _pinned(db: apps.Served) -> Iterator[None]:
    if db.pinned is not None:
        raise ConfigurationError("one_transaction() is open already: everything happens in that one.")
    real = db.strategy
    with real.engine.connect() as connection:
        transaction = connection.begin()
        db.pin(OneTransactionStrategy(real, connection))
        try:
            yield
        finally:
            db.pin(None)
            transaction.rollback()


def the_only_one() -> apps.Served:
    """Return the Alchemy of the one app there is.

    Raises:
        ConfigurationError: there is none, or more than one.
    """
    found = [db for db in apps.every() if db.app is not None and apps.find(db.app) is db]
    if len(found) != 1:
        raise ConfigurationError(
            f"{len(found)} Alchemy objects were found. Name yours in conftest.py: a fixture `alchemy`, with "
            f"scope='session', that imports your project and returns its Alchemy."
        )
    return found[0]
