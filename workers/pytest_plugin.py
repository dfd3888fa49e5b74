"""The pytest plugin: a transaction for each test that is rolled back, and the messages that would have been sent.

Found by its entry point, and imported at every start of pytest: so nothing is imported here until a fixture is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from .extension import Alchemy
    from .sending.recording import Enqueued


@pytest.fixture(scope="session")
def alchemy() -> Alchemy:
    """The Alchemy of the project under test: to be overridden in conftest.py.

    @pytest.fixture(scope="session")
    def alchemy():
        from shop import db
        return db
    """
    from .extension import Alchemy
    from .testing.one_transaction import the_only_one

    found = the_only_one()
    assert isinstance(found, Alchemy)
    return found


@pytest.fixture
def alchemy_session(alchemy: Alchemy) -> Iterator[Session]:
    """A Session for the test, on a transaction that is rolled back when the test is over.

    Units of work join it: eager tasks, tasks of a worker in a thread of this process, `db.unit_of_work()`, `db.session`
    in the test itself. What they commit, the test sees.
    """
    with alchemy.one_transaction() as session:
        yield session


@pytest.fixture
def alchemy_enqueued(alchemy: Alchemy) -> Iterator[Enqueued]:
    """The messages that the app would send, kept instead of sent: now, or when the COMMIT they wait for has come."""
    from .sending.recording import recording

    app: Any = alchemy.app
    with recording(app) as enqueued:
        yield enqueued
