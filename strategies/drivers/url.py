"""The URL of a database: parsed, checked, and shown without its secrets."""

from __future__ import annotations

import re
from collections.abc import Callable

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from ..errors import InvalidSetting
from . import spelling

#: The driver to name in a message instead of an async one.
_SYNC = {
    "asyncpg": "psycopg",
    "psycopg_async": "psycopg",
    "aiomysql": "pymysql",
    "asyncmy": "pymysql",
    "aiosqlite": "pysqlite",
    "aioodbc": "pyodbc",
    "oracledb_async": "oracledb",
}
#: What a host and a database are shown with: nothing that could set off a part of a password, or a keyword of a DSN.
_PLACE = re.compile(r"[\w.:/~\-\[\] ]*")
_END_OF_USER = re.compile(r"[^:/]*")


def shown(url: URL) -> str:
    """Return `url` for a message: no user, no password, no query, and nothing that could be half a password."""
    place = f"{url.host or ''}{f':{url.port}' if url.port else ''}/{url.database or ''}"
    in_query = any("@" in text for pair in url.query.items() for text in (pair[0], *pair[1]))
    return f"{url.drivername}://{place if _PLACE.fullmatch(place) and not in_query else '...'}"


def shown_text(value: str | URL) -> str | None:
    """Return the URL in `value` as `shown` does; None where it cannot be parsed for certain."""
    try:
        url = make_url(value)
    except (ArgumentError, ValueError, TypeError):
        return None
    return None if isinstance(value, str) and _splits_password(value, url) else shown(url)


def _splits_password(text: str, url: URL) -> bool:
    """Tell whether an "@" in the password of `text`, not percent-encoded, has cut it in two.

    SQLAlchemy ends a password at the first "@", so that the rest of it became a host, a database or a query.
    """
    if not url.host and url.username is None:
        return False  # a file of SQLite
    start = text.index("://") + 3
    if url.password is not None:
        start = text.index("@", text.index(":", start)) + 1
    elif url.username is not None:
        start = text.rindex("@", start, _END_OF_USER.search(text, start).end()) + 1  # type: ignore[union-attr]
    return "@" in f"{url.host}{url.database}{text[start:].partition('=')[0]}"


def parse_url(value: str | URL, setting: str, *, may_await: Callable[[], bool] = lambda: False) -> URL:
    """Return the URL in `value`, checked: SQLAlchemy can parse it, its driver is installed and is not async.

    Connects to nothing.

    Args:
        may_await: Tells whether there are coroutines to use it: then an async driver is no mistake.
    Raises:
        InvalidSetting: names `setting` and the remedy; the message holds no password, not even a part of a broken URL.
    """
    try:
        url = make_url(value)
    except (ArgumentError, ValueError, TypeError):
        # The text of a URL that cannot be parsed may be a password; SQLAlchemy's own message would repeat it.
        raise InvalidSetting(
            f"{setting} is not a URL that SQLAlchemy can parse (its text is not shown, for it may hold a password). "
            f"Write it as dialect+driver://user:password@host/database, special characters in the password "
            f"percent-encoded, for example postgresql+psycopg://shop@localhost/shop."
        ) from None
    if isinstance(value, str) and _splits_password(value, url):
        raise InvalidSetting(
            f"{setting} has an '@' behind the one that stands before its host (its text is not shown, for that is half "
            f"a password). Percent-encode special characters in the password, with urllib.parse.quote(password, "
            f"safe=''), or build the URL with sqlalchemy.URL.create()."
        )
    try:
        dialect = url.get_dialect()
    except NoSuchModuleError:
        raise InvalidSetting(f"{setting}={shown(url)!r}: {spelling.unknown(url)}") from None
    if dialect.is_async and not may_await():
        sync = url.set(drivername=f"{url.get_backend_name()}+{_SYNC.get(url.get_driver_name(), 'DRIVER')}")
        raise InvalidSetting(
            f"{setting}={shown(url)!r} names the async driver {dialect.driver!r}, but Celery tasks are ordinary "
            f"functions. Use {shown(sync)!r}."
        )
    try:
        dialect.import_dbapi()
    except ImportError as error:
        remedy = spelling.missing(url, dialect.driver, error.name or dialect.driver)
        raise InvalidSetting(
            f"{setting}={shown(url)!r} needs the driver {dialect.driver!r}, which cannot be imported ({error}). "
            f"{remedy}"
        ) from error
    return _password_in_its_place(url)


def _password_in_its_place(url: URL) -> URL:
    """Return `url` with a password that stands in its query where SQLAlchemy's `repr` masks it."""
    for name in ("password", "passwd"):
        value = url.query.get(name)
        if isinstance(value, str):
            url = url.difference_update_query([name]).set(password=url.password or value)
    return url
