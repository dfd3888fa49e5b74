"""Where the servers are: named by the environment, running on this machine, or embedded from PyPI.

CELERY_ALCHEMY_TEST_POSTGRESQL, _REDIS, _MARIADB and _RABBITMQ hold URLs; the first two may say "embedded".
CELERY_ALCHEMY_REQUIRE_SERVERS lists the optional ones ("mariadb,rabbitmq") whose absence fails the run instead of
skipping the tests that need them.
"""

import getpass
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import redis
from sqlalchemy import URL, NullPool, create_engine, make_url, text

CONNECT_TIMEOUT_S = 3
EMBEDDED = "embedded"


@contextmanager
def postgresql() -> Iterator[URL]:
    """Give the URL of a PostgreSQL database whose user may create databases."""
    given = os.environ.get("CELERY_ALCHEMY_TEST_POSTGRESQL")
    if given and given != EMBEDDED:
        yield make_url(given).set(drivername="postgresql+psycopg")
        return
    for url in () if given else _local_postgresql():
        if _may_create_databases(url):
            yield url
            return
    from celery_alchemy.loadtests.services.rundir import run_directory
    from celery_alchemy.loadtests.services.servers import PostgreSQLServer

    with run_directory() as run, PostgreSQLServer(run) as server:
        yield server.url


class RedisURLs(NamedTuple):
    """The same server, as Celery and as redis-py spell it."""

    celery: str
    client: str


@contextmanager
def redis_server() -> Iterator[RedisURLs]:
    """Give the URLs of a Redis or Valkey server."""
    url = os.environ.get("CELERY_ALCHEMY_TEST_REDIS")
    if not url and _answers_ping("redis://127.0.0.1:6379/0"):
        url = "redis://127.0.0.1:6379/0"
    if url and url != EMBEDDED:
        yield RedisURLs(url, url)
        return
    from celery_alchemy.loadtests.services.rundir import run_directory
    from celery_alchemy.loadtests.services.servers import ValkeyServer

    with run_directory() as run, ValkeyServer(run) as server:
        yield RedisURLs(server.url, f"unix://{server.socket}?db=0")


def mariadb() -> URL:
    """Return the URL of a MariaDB or MySQL server whose user may create databases; skip when there is none."""
    url = make_url(os.environ.get("CELERY_ALCHEMY_TEST_MARIADB", "mysql+pymysql://root@127.0.0.1:3306/"))

    def connect() -> None:
        engine = create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": CONNECT_TIMEOUT_S})
        with engine.connect():
            pass

    _optional("mariadb", "CELERY_ALCHEMY_TEST_MARIADB", connect)
    return url


def rabbitmq() -> str:
    """Return the URL of a RabbitMQ server; skip when there is none."""
    url = os.environ.get("CELERY_ALCHEMY_TEST_RABBITMQ", "amqp://guest:guest@127.0.0.1:5672//")

    def connect() -> None:
        from kombu import Connection

        with Connection(url, connect_timeout=CONNECT_TIMEOUT_S) as connection:
            connection.connect()

    _optional("rabbitmq", "CELERY_ALCHEMY_TEST_RABBITMQ", connect)
    return url


def _optional(name: str, variable: str, connect: Callable[[], None]) -> None:
    try:
        connect()
    except Exception as error:
        reason = f"no {name} here ({type(error).__name__}); set {variable} to the URL of one"
        if name in os.environ.get("CELERY_ALCHEMY_REQUIRE_SERVERS", "").split(","):
            pytest.fail(f"CELERY_ALCHEMY_REQUIRE_SERVERS lists {name}: {reason}", pytrace=False)
        pytest.skip(reason)


def _local_postgresql() -> Iterator[URL]:
    for user in (getpass.getuser(), "postgres"):
        yield URL.create("postgresql+psycopg", username=user, host="127.0.0.1", port=5432, database="postgres")


def _may_create_databases(url: URL) -> bool:
    engine = create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": CONNECT_TIMEOUT_S})
    try:
        with engine.connect() as connection:
            allowed = "SELECT rolcreatedb OR rolsuper FROM pg_roles WHERE rolname = current_user"
            return bool(connection.scalar(text(allowed)))
    except Exception:
        return False


def _answers_ping(url: str) -> bool:
    try:
        with redis.Redis.from_url(url, socket_connect_timeout=CONNECT_TIMEOUT_S) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False
