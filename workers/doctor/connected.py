"""What the servers say, against what the app expects of them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from celery import Celery
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from ...strategies.drivers.url import shown
from ...strategies.options import DatabaseOptions
from ...strategies.several import in_doubt
from ...strategies.several.servers import TwoPhaseUnavailable
from ..exactly_once.choosing import has_any
from ..extension import Alchemy
from ..settings import DEFAULT
from .code import tasks_of
from .completed import keeps_results, look_at_completed
from .findings import Finding, error, note, warning
from .outbox import look_at_outbox
from .servers import Server, ask

#: What servers say that have no connection left: PostgreSQL (53300), MySQL and MariaDB (1040, 1203, 1226), PgBouncer.
_FULL = re.compile(
    r"too many (?:clients|connections)|remaining connection slots|no more connections allowed|max_user_connections"
    r"|max_client_conn|too many active user connections",
    re.I,
)


def look_at_servers(app: Celery, databases: dict[str, Alchemy], servers: dict[str, Server]) -> Iterator[Finding]:
    """Connect to every database, put what it says into `servers`, and yield what does not fit."""
    for name, db in databases.items():
        engine = db.engine
        try:
            server = servers[name] = ask(engine)
            outbox = list(look_at_outbox(db, engine)) if db.settings.outbox and name == DEFAULT else []
            by = "Tasks have exactly_once" if has_any(app, db.settings) else keeps_results(app)
            if name == DEFAULT and by:
                outbox += look_at_completed(db, engine, by)
        except Exception as failure:
            yield _unreachable(name, engine, failure)
            continue
        finally:
            db.dispose()
        yield from _pooler(name, engine.dialect.driver, db.strategy.engines.options, server)
        yield from _timeouts(app, name, server)
        yield from _recycling(name, db, server)
        yield from outbox
        if db.strategy.engines.options.two_phase:
            yield from _two_phase(name, db, server)
    yield from _replicas(databases)
    if any(db.settings.two_phase for db in databases.values()) and len(servers) == len(databases):
        yield from _in_doubt(databases)


def _unreachable(name: str, engine: Engine, failure: Exception) -> Finding:
    if _FULL.search(_reason(failure)):
        return error(
            "too-many-clients",
            f"The server of {name!r} ({shown(engine.url)}) has no connection left: {_reason(failure)}. Workers get the "
            f"same error with their next connection, and their tasks fail.",
            "See who holds them (PostgreSQL: pg_stat_activity, MySQL: SHOW PROCESSLIST), end what is idle in "
            "transaction, raise max_connections, or put PgBouncer between and set alchemy_external_pooler = "
            "'pgbouncer'. --no-connect tells how many connections your workers want.",
            name,
        )
    return error(
        "unreachable",
        f"The database {name!r} ({shown(engine.url)}) cannot be asked: {_reason(failure)}",
        "Check the URL, the network and the server's access rules; --no-connect leaves the servers alone.",
        name,
    )


def _pooler(name: str, driver: str, options: DatabaseOptions, server: Server) -> Iterator[Finding]:
    if server.pooler and not options.external_pooler:
        prepares = f"{driver} prepares statements, which the next transaction's connection does not know"
        sets = "what is set for a session reaches other clients"
        yield error(
            "pooler",
            f"A connection pooler stands before the database {name!r}, and the app does not know: in transaction mode "
            f"{prepares if driver in {'psycopg', 'asyncpg'} else sets}.",
            "Set alchemy_external_pooler = 'pgbouncer'.",
            "alchemy_external_pooler",
        )
    elif options.external_pooler and not server.pooler:
        yield warning(
            "no-pooler",
            f"alchemy_external_pooler is set, but the database {name!r} is asked directly: statements are not "
            f"prepared, and read_only=True costs a transaction, for nothing.",
            "Leave it out, or connect through the pooler.",
            "alchemy_external_pooler",
        )


def _timeouts(app: Celery, name: str, server: Server) -> Iterator[Finding]:
    idle_s = server.settings.get("idle_in_transaction_session_timeout")
    limits = [task.time_limit or app.conf.task_time_limit for task in tasks_of(app).values()]
    if idle_s and any(limit is None or limit > idle_s for limit in limits):
        yield note(
            "idle-in-transaction",
            f"The server of {name!r} ends a transaction in which nothing is asked for {idle_s:g} s, and tasks may run "
            f"longer.",
            "Commit before slow work, or call self.db.rollback(): the connection goes back to the pool.",
            "idle_in_transaction_session_timeout",
        )


def _recycling(name: str, db: Alchemy, server: Server) -> Iterator[Finding]:
    wait_s, recycle_s = server.settings.get("wait_timeout"), db.settings.engine_options.get("pool_recycle", -1)
    if wait_s and recycle_s >= wait_s:
        yield note(
            "recycle",
            f"pool_recycle of {name!r} is {recycle_s} s, and the server closes idle connections after {wait_s:g} s "
            f"(wait_timeout): it comes too late. That harms nothing: a closed connection is noticed and replaced.",
            f"Leave it out of {db.strategy.engines.options.options_setting}.",
            "wait_timeout",
        )


def _two_phase(name: str, db: Alchemy, server: Server) -> Iterator[Finding]:
    prepared = server.settings.get("max_prepared_transactions")
    if prepared == 0:
        yield error(
            "two-phase",
            f"alchemy_two_phase is True, but the server of {name!r} prepares no transactions: every unit of work over "
            f"several databases fails.",
            "Set max_prepared_transactions in postgresql.conf to at least the most connections of all workers.",
            "max_prepared_transactions",
        )


def _in_doubt(databases: dict[str, Alchemy]) -> Iterator[Finding]:
    try:
        found = in_doubt.find({name: db.engine for name, db in databases.items()})
    except TwoPhaseUnavailable as failure:
        yield error(
            "two-phase", str(failure), "Grant what it says; or leave alchemy_two_phase out.", "alchemy_two_phase"
        )
        return
    except SQLAlchemyError as failure:
        yield warning(
            "in-doubt",
            f"The prepared transactions cannot be listed: {_reason(failure)}",
            "Give this user the right to (MySQL: XA_RECOVER_ADMIN), or run `celery alchemy in-doubt` as another.",
        )
        return
    finally:
        for db in databases.values():
            db.dispose()
    if found:
        yield warning(
            "in-doubt",
            f"{len(found)} transactions are prepared and not ended. If they stay, a process was killed between the two "
            f"phases, and their locks are held.",
            "celery -A ... alchemy in-doubt --resolve",
        )


def _replicas(databases: dict[str, Alchemy]) -> Iterator[Finding]:
    for name, db in databases.items():
        if db.strategy.engines.options.replica_url is None:
            continue
        engine = db.strategy.read_engine
        try:
            if ask(engine).settings.get("is_replica") is False:
                yield note(
                    "no-replica",
                    f"{shown(engine.url)}, where read_only=True tasks of {name!r} read, is no replica.",
                    "That works; if you meant one, check the URL.",
                    "alchemy_replica_database_url",
                )
        except Exception as failure:
            yield error(
                "unreachable",
                f"The replica of {name!r} ({shown(engine.url)}) cannot be asked: {_reason(failure)}",
                "Check alchemy_replica_database_url.",
                "alchemy_replica_database_url",
            )
        finally:
            db.dispose()


def _reason(failure: Exception) -> str:
    if not isinstance(failure, SQLAlchemyError):
        return f"{type(failure).__name__} in connect_args, creator or a listener of the Engine"
    return " ".join(str(getattr(failure, "orig", None) or failure).split())[:300]
