"""What tasks use to talk to their test: Redis lists, a barrier, and a look at the database from outside."""

import functools
import json
import os
from typing import Any

import redis
from sqlalchemy import Engine, NullPool, create_engine, make_url, text

BARRIER_TIMEOUT_S = 40
config: dict[str, Any] = json.loads(os.environ["CONTRACT_PROJECT"])


@functools.cache
def client() -> redis.Redis:
    # Without a timeout of the socket's own: BLPOP has one.
    return redis.Redis.from_url(config["redis_url"], decode_responses=True, socket_timeout=None)


def name(kind: str, of: str) -> str:
    """Return the Redis key of a list of this test run."""
    return f"{config['prefix']}{kind}:{of}"


def say(key: str, value: Any) -> None:
    """Append a value to what the test will read with `worker.said(key)`."""
    client().rpush(name("said", key), json.dumps(value))


def barrier(key: str, parties: int) -> None:
    """Return once `parties` callers have called; raise after a deadline."""
    everyone = name("barrier", key)
    if client().incr(everyone) == parties:
        client().rpush(f"{everyone}:go", *range(parties))
    if client().blpop([f"{everyone}:go"], timeout=BARRIER_TIMEOUT_S) is None:
        raise RuntimeError(f"{client().get(everyone)} of {parties} came to the barrier")


@functools.cache
def observer() -> Engine:
    """Return an Engine of our own, which keeps no connection, to see what everyone can see."""
    url = make_url(config["database_url"])
    if url.get_backend_name() == "postgresql":
        url = url.update_query_dict({"application_name": "observer"})
    return create_engine(url, poolclass=NullPool)


def committed(key: str) -> list[str]:
    """Return the notes of the committed rows of `key`."""
    with observer().connect() as connection:
        return list(connection.scalars(text("SELECT note FROM rows_ WHERE key_ = :key ORDER BY id"), {"key": key}))


def use(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))


def set_on_connection(connection: Any, record: Any) -> None:
    """What a `connect` listener is for: a setting of the connection, here one that the project's tasks can read."""
    autocommit, connection.autocommit = connection.autocommit, True
    connection.cursor().execute("SET contract.listener = 'was here'")
    connection.autocommit = autocommit


def open_transactions() -> int:
    """Return how many connections of this worker are in a transaction (PostgreSQL), 0 elsewhere."""
    if observer().dialect.name != "postgresql":
        return 0
    sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = :worker AND state <> 'idle'"
    with observer().connect() as connection:
        return int(connection.scalar(text(sql), {"worker": config["worker"]}) or 0)
