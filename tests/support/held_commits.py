"""COMMITs that last until a test lets them go: a deferred trigger waits for an advisory lock that the test holds."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import NullPool, create_engine, text

from support.databases import PostgreSQL
from support.waiting import eventually

STATEMENTS = (
    "CREATE TABLE IF NOT EXISTS held_ (key_ text)",
    "CREATE OR REPLACE FUNCTION wait_() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
    "PERFORM pg_advisory_xact_lock(hashtext(NEW.key_)); RETURN NULL; END $$",
    "DROP TRIGGER IF EXISTS wait ON held_",
    "CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON held_ DEFERRABLE INITIALLY DEFERRED FOR EACH ROW "
    "EXECUTE FUNCTION wait_()",
)
"""A row in this table lets the COMMIT wait for the advisory lock of its key."""


@contextmanager
def held_commits(database: PostgreSQL, key: str) -> Iterator[None]:
    """Let each COMMIT that has written `key` into `held_` wait until the block ends."""
    engine = create_engine(database.url("holder"), poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(hashtext(:key))"), {"key": key})
        yield


def wait_for_commit(database: PostgreSQL, worker: str) -> None:
    """Return once a connection of `worker` waits in a COMMIT."""
    waiting = (
        "SELECT 1 FROM pg_stat_activity WHERE application_name = :worker AND wait_event = 'advisory' "
        "AND upper(query) LIKE 'COMMIT%'"
    )
    eventually(lambda: database.column(waiting, worker=worker), f"a COMMIT of {worker} waits")
