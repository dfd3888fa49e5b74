"""What stops a program or a task from outside in a callback after the COMMIT takes no other callback along."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from gevent import GreenletExit, Timeout
from sqlalchemy import text

from celery_alchemy import Alchemy

FROM_OUTSIDE = [SystemExit(3), KeyboardInterrupt(), Timeout()]


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Alchemy]:
    app = Celery(set_as_current=False)
    app.conf.alchemy_database_url = f"sqlite:///{tmp_path}/rows.sqlite"
    alchemy = Alchemy(app)
    with alchemy.unit_of_work() as session:
        session.execute(text("CREATE TABLE rows (note TEXT)"))
    yield alchemy
    alchemy.dispose()


def commit(db: Alchemy, error: BaseException, ran: list[int]) -> None:
    """Commit a row, with callbacks of which the second raises `error`."""

    def raises() -> None:
        raise error

    with db.unit_of_work() as session:
        session.execute(text("INSERT INTO rows VALUES ('here')"))
        for callback in (lambda: ran.append(1), raises, lambda: ran.append(3), lambda: ran.append(4)):
            db.on_commit(callback)


def rows(db: Alchemy) -> int:
    with db.engine.connect() as connection:
        return int(connection.execute(text("SELECT count(*) FROM rows")).scalar_one())


@pytest.mark.parametrize("error", FROM_OUTSIDE, ids=lambda error: type(error).__name__)
def test_the_others_run_and_then_it_is_raised(db: Alchemy, error: BaseException) -> None:
    ran: list[int] = []
    with pytest.raises(type(error)) as raised:
        commit(db, error, ran)
    assert raised.value is error
    assert ran == [1, 3, 4]
    assert rows(db) == 1
    commit(db, RuntimeError("logged only"), ran)
    assert ran == [1, 3, 4, 1, 3, 4]


def test_a_killed_greenlet_waits_for_nothing_and_says_what_is_lost(
    db: Alchemy, caplog: pytest.LogCaptureFixture
) -> None:
    ran: list[int] = []
    with caplog.at_level(logging.ERROR), pytest.raises(GreenletExit):
        commit(db, GreenletExit(), ran)
    assert ran == [1]
    assert rows(db) == 1
    assert "2 more on_commit callbacks do not run" in caplog.text
