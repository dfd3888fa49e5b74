"""What the URL of a database should begin with: its dialect is unknown, or its driver is not installed."""

from __future__ import annotations

from difflib import get_close_matches

from sqlalchemy.engine import URL
from sqlalchemy.exc import NoSuchModuleError

from .awaited_urls import AWAITED

_DRIVERS = {
    "postgresql": ("postgresql+psycopg", "postgresql+psycopg2"),
    "mysql": ("mysql+pymysql", "mysql+mysqldb"),
    "mariadb": ("mariadb+pymysql", "mariadb+mysqldb"),
    "sqlite": ("sqlite",),
}
"""Of each kind of database, the first to be chosen."""
_INSTALL = {
    "psycopg": "pip install 'psycopg[binary]'",
    "psycopg2": "pip install psycopg2-binary",
    "pymysql": "pip install PyMySQL",
    "mysqldb": "pip install mysqlclient",
    "asyncpg": "pip install asyncpg",
    "asyncmy": "pip install asyncmy",
    "aiomysql": "pip install aiomysql",
    "aiosqlite": "pip install aiosqlite",
}


def unknown(url: URL) -> str:
    """Return what is wrong with a URL that SQLAlchemy has no dialect for, and what to write."""
    backend, _, driver = url.drivername.partition("+")
    if driver and _is_known(url.set(drivername=backend)):
        what = f"SQLAlchemy knows no driver {driver!r} for {backend}"
    else:
        what = f"SQLAlchemy knows no dialect {url.drivername!r}"
        backend = next(iter(get_close_matches(backend, _DRIVERS, n=1)), backend)
    if backend in _DRIVERS:
        return f"{what}. {_instead(url, backend, driver) or _first_of(backend)}"
    known = ", ".join(name for names in _DRIVERS.values() for name in names)
    return f"{what}. Known to work here: {known}."


def missing(url: URL, driver: str, package: str) -> str:
    """Return what to do about a URL whose `driver` is not installed.

    Args:
        package: What could not be imported.
    """
    backend = url.get_backend_name()
    installing = _INSTALL.get(driver, f"install the package that provides it ({package})")
    if instead := _instead(url, backend, driver):
        return f"{instead} Or {installing}."
    if "+" not in url.drivername and backend in _DRIVERS:
        return _first_of(backend)  # SQLAlchemy has chosen the driver, not the user
    return f"Remedy: {installing}."


def _instead(url: URL, backend: str, driver: str) -> str | None:
    """Say what the URL can begin with, of the drivers that are installed here; None where none is."""
    drivers = AWAITED if _is_awaited(url) else _DRIVERS
    names = sorted(drivers.get(backend, ()), key=lambda name: name != f"{backend}+{driver}")
    found = next((name for name in names if _is_installed(url.set(drivername=name))), None)
    if found is None:
        return None
    return f"Begin the URL with {found}:// (this driver is installed); the rest stays as it is."


def _first_of(backend: str) -> str:
    name = _DRIVERS[backend][0]
    return f"Begin the URL with {name}://, and install this driver: {_INSTALL[name.partition('+')[2]]}."


def _is_awaited(url: URL) -> bool:
    return _is_known(url) and bool(url.get_dialect().is_async)


def _is_known(url: URL) -> bool:
    try:
        url.get_dialect()
    except (NoSuchModuleError, ImportError):
        return False
    return True


def _is_installed(url: URL) -> bool:
    try:
        url.get_dialect().import_dbapi()
    except ImportError:
        return False
    return True
