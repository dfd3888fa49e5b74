"""What a task leaves on the server's side of its connection, and how the next one would see it."""

from typing import NamedTuple


class Leftover(NamedTuple):
    leave: tuple[str, ...]
    look: str
    clean: object
    """What `look` gives on a connection that nothing was left on."""


POSTGRESQL = {
    "role": Leftover(("SET ROLE pg_monitor",), "SELECT current_user = session_user", True),
    "authorization": Leftover(("SET SESSION AUTHORIZATION pg_monitor",), "SELECT session_user = 'pg_monitor'", False),
    "own setting": Leftover(("SET app.tenant = 'a'",), "SELECT coalesce(current_setting('app.tenant', true), '')", ""),
    "set_config": Leftover(
        ("SELECT set_config('app.tenant', 'a', false)",), "SELECT coalesce(current_setting('app.tenant', true), '')", ""
    ),
    "search_path": Leftover(("SET search_path = pg_catalog",), "SHOW search_path", '"$user", public'),
    "time zone": Leftover(("SET TIME ZONE 'Asia/Tokyo'",), "SELECT current_setting('TimeZone') = 'Asia/Tokyo'", False),
    "timeout": Leftover(("SET statement_timeout = 12345",), "SHOW statement_timeout", "0"),
    "encoding": Leftover(("SET client_encoding = 'LATIN1'",), "SHOW client_encoding", "UTF8"),
    "read-write": Leftover(
        ("SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE",),
        "SHOW default_transaction_isolation",
        "read committed",
    ),
    "temporary table": Leftover(
        ("CREATE TEMP TABLE left_behind AS SELECT 1",), "SELECT to_regclass('pg_temp.left_behind')::text", None
    ),
    "advisory lock": Leftover(
        ("SELECT pg_advisory_lock(4711)",),
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
        0,
    ),
    "prepared by SQL": Leftover(
        ('PREPARE "of ""mine" AS SELECT 1',), "SELECT count(*) FROM pg_prepared_statements WHERE from_sql", 0
    ),
    "cursor": Leftover(
        ("DECLARE held CURSOR WITH HOLD FOR SELECT 1",), "SELECT count(*) FROM pg_cursors WHERE is_holdable", 0
    ),
    "listen": Leftover(("LISTEN somebody",), "SELECT count(*) FROM pg_listening_channels()", 0),
}
#: Lets a connection leave these that may only read.
WRITES = "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE"

MARIADB = {
    "user variable": Leftover(("SET @tenant = 5",), "SELECT @tenant", None),
    "session variable": Leftover(("SET SESSION sql_mode = 'ANSI'",), "SELECT @@sql_mode LIKE '%%ANSI%%'", 0),
    "time zone": Leftover(("SET time_zone = '+09:00'",), "SELECT @@time_zone = '+09:00'", 0),
    "isolation": Leftover(
        ("SET SESSION TRANSACTION ISOLATION LEVEL SERIALIZABLE",), "SELECT @@tx_isolation", "REPEATABLE-READ"
    ),
    "character set": Leftover(("SET NAMES latin1",), "SELECT @@character_set_client", "utf8mb4"),
    "user lock": Leftover(("SELECT GET_LOCK('of mine', 0)",), "SELECT IS_FREE_LOCK('of mine')", 1),
    "temporary table": Leftover(
        ("CREATE TEMPORARY TABLE rows_ (only_here INT)", "INSERT INTO rows_ VALUES (1)"),
        "SELECT count(*) FROM rows_ WHERE 1 = 0 AND id = 0",
        0,
    ),
    "locked table": Leftover(("LOCK TABLES counters READ",), "SELECT count(*) FROM rows_ WHERE 1 = 0", 0),
    "database": Leftover(("USE mysql",), "SELECT DATABASE() = 'mysql'", 0),
    "autocommit": Leftover(("SET autocommit = 1",), "SELECT @@autocommit", 0),
    "role": Leftover(("SET ROLE {role}",), "SELECT CURRENT_ROLE()", None),
}


def leftovers(driver: str, role: str = "") -> dict[str, Leftover]:
    if not driver.startswith("psycopg"):
        return {
            name: one._replace(leave=tuple(text.format(role=role) for text in one.leave))
            for name, one in MARIADB.items()
        }
    return POSTGRESQL
