"""A server that has refused a connection for good decides, whatever else was tried before or after it."""

import itertools
import socket
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import exc, make_url, text
from support import forking, refusing, servers
from support.apps import make_app
from support.databases import PostgreSQL

from celery_alchemy import TransientDatabaseError, WorkerPool, is_transient

Said = tuple[str, str, str]  # severity, SQLSTATE, message

PASSWORD: Said = ("FATAL", "28P01", 'password authentication failed for user "shop"')
FOR_GOOD: list[Said] = [
    PASSWORD,
    ("FATAL", "28P01", "Passwort-Authentifizierung für Benutzer »shop« fehlgeschlagen"),
    ("ВАЖНО", "28P01", 'пользователь "shop" не прошёл проверку подлинности (по паролю)'),
    ("致命错误", "28P01", "用户 \"shop\" Password 认证失败"),
    ("FATAL", "28000", 'no pg_hba.conf entry for host "10.0.0.1", user "shop", database "shop", no encryption'),
    ("FATAL", "28000", 'role "is starting up" does not exist'),
    ("FATAL", "3D000", 'database "connection refused" does not exist'),
    ("FATAL", "55000", 'database "shop" is not currently accepting connections'),
    ("FATAL", "42501", 'permission denied for database "timed out"'),
    # PgBouncer's
    ("FATAL", "08P01", "no such database: shop"),
    ("FATAL", "28P01", "SASL authentication failed"),
    ("FATAL", "08P01", "server login has been failing, cached error: no such user (server_login_retry)"),
]  # fmt: skip
PASSING: list[Said] = [
    ("FATAL", "57P03", "the database system is starting up"),
    ("FATAL", "57P03", "the database system is not yet accepting connections"),
    ("FATAL", "53300", "sorry, too many clients already"),
    ("FATAL", "53300", 'too many connections for role "shop"'),
    ("FATAL", "53300", "remaining connection slots are reserved for roles with the SUPERUSER attribute"),
    ("FATAL", "57P03", "das Datenbanksystem startet"),
    ("FATAL", "57P03", "le système de bases de données s'arrête"),
    ("ВАЖНО", "57P03", "система баз данных запускается"),
    ("FATAL", "57P03", "データベースシステムは起動処理中です"),
    ("FATAL", "08P01", "no more connections allowed (max_client_conn)"),
    ("FATAL", "08P01", "query_wait_timeout"),
    ("FATAL", "08P01", "server login has been failing, cached error: connect failed (server_login_retry)"),
]
by_message = lambda said: said[2][:30] if isinstance(said, tuple) else None  # noqa: E731
DRIVERS = pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
NOBODY = 1  # no server listens there


def failure(driver: str, ports: Sequence[int], **query: str) -> exc.DBAPIError:
    """Connect to the first of `ports` that lets us in, and return the error: none does."""
    hosts = [f"127.0.0.1:{port}" for port in ports]
    url = make_url(f"postgresql+{driver}://shop:wrong@/shop").update_query_dict({"host": hosts, **query})
    return failure_at(url.render_as_string(hide_password=False))


def failure_at(url: str) -> exc.DBAPIError:
    _, db = make_app(url)
    db.start_worker(WorkerPool(name="threads", concurrency=2))
    with pytest.raises(exc.DBAPIError) as raised, db.unit_of_work() as session:
        session.execute(text("SELECT 1"))
    db.stop()
    assert isinstance(raised.value, TransientDatabaseError) == is_transient(raised.value)
    assert is_transient(raised.value.orig) == is_transient(raised.value), "the driver's own error says the same"
    return raised.value


@DRIVERS
@pytest.mark.parametrize("said", FOR_GOOD, ids=by_message)
def test_refused_for_good_by_one_of_several_addresses(driver: str, said: Said) -> None:
    """Wherever it stands among those where nothing listens, and where a server is starting."""
    severity, code, message = said
    with (
        refusing.postgresql(code, message, severity=severity) as refused,
        refusing.postgresql("57P03", "the database system is starting up") as starting,
    ):
        orders = [[refused], *itertools.permutations([refused, NOBODY]), [NOBODY, NOBODY, refused], [starting, refused]]
        for ports in orders:
            assert not is_transient(failure(driver, ports)), ports


@DRIVERS
@pytest.mark.parametrize("said", PASSING, ids=by_message)
def test_refused_for_now(driver: str, said: Said) -> None:
    severity, code, message = said
    with refusing.postgresql(code, message, severity=severity, more="Hot standby mode is disabled.") as refused:
        for ports in ([refused], [NOBODY, refused], [refused, NOBODY]):
            assert is_transient(failure(driver, ports)), ports


@DRIVERS
@pytest.mark.parametrize(("said", "passes"), [(PASSWORD, False), (PASSING[0], True)], ids=["for good", "for now"])
def test_a_name_with_two_addresses(driver: str, said: Said, passes: bool) -> None:
    """The URL itself resolves it, for a test cannot: as the messages have it, that is the same."""
    with refusing.postgresql(*said[1:]) as port:
        query = f"host=shop.test,shop.test&hostaddr=127.0.0.2,127.0.0.1&port={port},{port}"
        error = failure_at(f"postgresql+{driver}://shop:wrong@/shop?{query}")
    assert "Connection refused" in str(error)
    assert is_transient(error) == passes


@DRIVERS
@pytest.mark.parametrize("change", [{"username": "nosuch"}, {"database": "nosuch"}])
def test_a_real_server_behind_one_that_is_away(run_database: PostgreSQL, driver: str, change: dict[str, Any]) -> None:
    url = make_url(run_database.url("refused", driver=driver))
    there = url.query.get("host") or f"{url.host}:{url.port or 5432}"
    url = url.set(host=None, port=None, **change).update_query_dict({"host": [f"127.0.0.1:{NOBODY}", f"{there}"]})
    if str(there).startswith("/"):
        url = url.update_query_dict({"host": f"127.0.0.1,{there}", "port": f"{NOBODY},5432"})
    error = failure_at(url.render_as_string(hide_password=False))
    assert "Connection refused" in str(error)
    assert "does not exist" in str(error)
    assert not is_transient(error)


@DRIVERS
def test_a_server_without_encryption(driver: str) -> None:
    """libpq refuses it, not the server; it does not pass either."""
    with refusing.postgresql(*PASSWORD[1:]) as port:
        error = failure(driver, [NOBODY, port], sslmode="require")
    assert "SSL was required" in str(error)
    assert not is_transient(error)


@DRIVERS
def test_one_that_does_not_answer_and_one_that_refuses(driver: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, refusing.postgresql(*PASSWORD[1:]) as refused:
        ports = [silent.getsockname()[1], refused]
        error = failure(driver, ports, connect_timeout="2")
        assert not is_transient(error)
        error = failure(driver, [silent.getsockname()[1], NOBODY], connect_timeout="2")
        assert is_transient(error)


@DRIVERS
def test_a_server_that_hangs_up_and_one_that_refuses(driver: str) -> None:
    with refusing.hanging_up() as hanging, refusing.postgresql(*PASSWORD[1:]) as refused:
        assert is_transient(failure(driver, [hanging]))
        error = failure(driver, [hanging, refused])
        assert is_transient(error) == (PASSWORD[2] not in str(error)), "libpq alone does not go on to the next"


@pytest.mark.parametrize("driver", ["pymysql", "mysqldb"])
def test_a_wrong_password_of_mariadb(driver: str) -> None:
    forking.require(driver)
    url = servers.mariadb().set(drivername=f"mysql+{driver}", username="celery_alchemy_nosuch", password="wrong")
    error = failure_at(url.render_as_string(hide_password=False))
    assert error.orig is not None
    assert error.orig.args[0] in {1045, 1698}
    assert not is_transient(error)
    url = servers.mariadb().set(drivername=f"mysql+{driver}", database="celery_alchemy_nosuch")
    error = failure_at(url.render_as_string(hide_password=False))
    assert not is_transient(error)
