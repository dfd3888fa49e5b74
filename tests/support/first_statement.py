"""What the tests of alchemy_begin_with_first_statement look at."""

import io
from collections.abc import Callable
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy
from celery_alchemy.loadtests.services.proxy import CountingProxy

DRIVERS = ("psycopg", "psycopg2")
BEGIN, COMMIT = 1, 1
IN_TRANSACTION, FAILED, IDLE = 2, 3, 0  # libpq's numbers
Started = Callable[..., Alchemy]


def trips(proxy: CountingProxy, work: Callable[[], object]) -> int:
    before = proxy.round_trips
    work()
    return proxy.round_trips - before


def status(session: Session) -> int:
    """What libpq knows of the transaction."""
    return int(session.connection().connection.dbapi_connection.info.transaction_status)  # type: ignore[union-attr]


def raw(session: Session) -> Any:
    return session.connection().connection.dbapi_connection


def server_says(session: Session, *names: str) -> list[str]:
    return [session.scalar(text(f"SELECT current_setting('{name}')")) or "" for name in names]


def unit(db: Alchemy, work: Callable[[Session], object], **options: Any) -> None:
    with db.unit_of_work(**options) as session:
        work(session)


def copy_in(connection: Any, key: str) -> None:
    statement = "COPY rows_ (key_, note) FROM STDIN"
    with connection.cursor() as cursor:
        if hasattr(cursor, "copy_expert"):
            cursor.copy_expert(statement, io.StringIO(f"{key}\tcopied\n"))
        else:
            with cursor.copy(statement) as copy:
                copy.write_row((key, "copied"))
