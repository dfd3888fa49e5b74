"""What the user of the database must be allowed to do with the outbox, and what an error says where it may not."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import make_url
from support.databases import MariaDB, PostgreSQL
from support.outbox import TABLE, Shop

from celery_alchemy import ConfigurationError
from celery_alchemy.workers.sending.outbox import send_waiting

MARIADB = "mariadb"


@contextmanager
def shop_of(database: Any, key: str, rights: str, **settings: Any) -> Iterator[Shop]:
    """Yield an app whose user of the database has no more than these rights."""
    role, postgresql = f"writer_{key[:8]}", isinstance(database, PostgreSQL)
    user = role if postgresql else f"{role}@'%'"
    database.execute(f"DELETE FROM {TABLE}")
    database.execute(f"CREATE ROLE {role} LOGIN" if postgresql else f"CREATE USER {user} IDENTIFIED BY 's3cret'")
    if rights:
        database.execute(f"GRANT {rights} ON {TABLE} TO {user}")
    if postgresql:
        database.execute(f"GRANT USAGE ON SEQUENCE {TABLE}_id_seq TO {user}")
    elif not rights:
        database.execute(f"GRANT SELECT ON users TO {user}")  # else it may not even connect
    url = make_url(database.url("outbox")).set(username=role, password="s3cret")
    shop = Shop(database, url.render_as_string(hide_password=False), **settings)
    try:
        yield shop
    finally:
        shop.stop()
        if postgresql:
            database.execute(f"REVOKE ALL ON {TABLE} FROM {user}")
            database.execute(f"REVOKE ALL ON SEQUENCE {TABLE}_id_seq FROM {user}")
        database.execute(f"DROP {'ROLE' if postgresql else 'USER'} {user}")


@pytest.fixture(params=["postgresql", MARIADB])
def server(request: pytest.FixtureRequest) -> PostgreSQL | MariaDB:
    found: PostgreSQL | MariaDB = request.getfixturevalue(MARIADB if request.param == MARIADB else "run_database")
    return found


@pytest.mark.parametrize("outbox_is", [True, "relay"], ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_who_only_writes_the_table_need_not_read_it(
    run_database: PostgreSQL, key: str, outbox_is: Any, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with shop_of(run_database, key, "INSERT", alchemy_outbox=outbox_is) as shop:
        with shop.broker_gone(monkeypatch), shop.db.unit_of_work():
            for number in range(count):
                shop.note.delay_on_commit(number)
        assert [len(batch) for batch in shop.waiting()] == [count]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("outbox_is", [True, "relay"], ids=str)
def test_who_may_not_write_is_told_table_right_and_remedy(server: Any, key: str, outbox_is: Any, count: int) -> None:
    with (
        shop_of(server, key, "", alchemy_outbox=outbox_is) as shop,
        pytest.raises(ConfigurationError) as refused,
        shop.db.unit_of_work(),
    ):
        for number in range(count):
            shop.note.delay_on_commit(number)
    message = str(refused.value)
    for part in ("does not let its user INSERT in", repr(TABLE), "GRANT", f"TO writer_{key[:8]}", "denied"):
        assert part in message
    assert "s3cret" not in message
    assert shop.waiting() == []


@pytest.mark.parametrize("rights", ["INSERT", "INSERT, SELECT"])
def test_a_sender_that_may_not_is_told_so(server: Any, key: str, rights: str) -> None:
    with shop_of(server, key, rights, alchemy_outbox="relay") as shop:
        with shop.db.unit_of_work():
            shop.note.delay_on_commit(1)
        with pytest.raises(ConfigurationError, match=r"its user (SELECT|UPDATE) in the table .* GRANT SELECT"):
            send_waiting(shop.db)
        assert [len(batch) for batch in shop.waiting()] == [1]


def test_who_may_not_delete_sends_and_warns(server: Any, key: str, caplog: pytest.LogCaptureFixture) -> None:
    """What was sent stays, and is sent again: that is said, with the remedy, and the task has succeeded."""
    with shop_of(server, key, "INSERT", alchemy_outbox=True) as shop:
        with shop.db.unit_of_work():
            shop.note.delay_on_commit(1)
        assert shop.arguments() == [[1]]
        assert len(shop.waiting()) == 1
    (said,) = [one.getMessage() for one in caplog.records if "could not be deleted" in one.getMessage()]
    assert "GRANT SELECT" in said
