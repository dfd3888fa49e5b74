"""The URL of a database: parsed, checked, and shown without its secrets."""

from __future__ import annotations

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from ..errors import InvalidSetting

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
_INSTALL = {
    "psycopg": "pip install 'celery-alchemy[postgresql]'",
    "pymysql": "pip install 'celery-alchemy[mysql]'",
    "psycopg2": "pip install psycopg2-binary",
    "mysqldb": "pip install mysqlclient",
}


def shown(url: URL) -> str:
    """Return `url` for a message: no user, no password, no query, and nothing that could be half a password."""
    place = f"{url.host or ''}{f':{url.port}' if url.port else ''}/{url.database or ''}"
    return f"{url.drivername}://{'...' if '@' in place or '%' in place else place}"


def parse_url(value: str | URL, setting: str) -> URL:
    """Return the URL in `value`, checked: SQLAlchemy can parse it, its driver is installed and is not async.

    Connects to nothing. Raises:
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
    try:
        dialect = url.get_dialect()
    except NoSuchModuleError:
        raise InvalidSetting(
            f"{setting}={shown(url)!r}: SQLAlchemy knows no dialect {url.drivername!r}. Known to work here: "
            f"postgresql+psycopg, postgresql+psycopg2, mysql+pymysql, mysql+mysqldb, sqlite."
        ) from None
    if dialect.is_async:
        sync = url.set(drivername=f"{url.get_backend_name()}+{_SYNC.get(url.get_driver_name(), 'DRIVER')}")
        raise InvalidSetting(
            f"{setting}={shown(url)!r} names the async driver {dialect.driver!r}, but Celery tasks are ordinary "
            f"functions. Use {shown(sync)!r}."
        )
    try:
        dialect.import_dbapi()
    except ImportError as error:
        install = _INSTALL.get(dialect.driver, f"install the package that provides it ({error.name or dialect.driver})")
        raise InvalidSetting(
            f"{setting}={shown(url)!r} needs the driver {dialect.driver!r}, which cannot be imported ({error}). "
            f"Remedy: {install}."
        ) from error
    return _password_in_its_place(url)


def _password_in_its_place(url: URL) -> URL:
    """Return `url` with a password that stands in its query where SQLAlchemy's `repr` masks it."""
    for name in ("password", "passwd"):
        value = url.query.get(name)
        if isinstance(value, str):
            url = url.difference_update_query([name]).set(password=url.password or value)
    return url
