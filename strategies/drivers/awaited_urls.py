"""Which URLs can be awaited, and what to write instead of those that cannot."""

from __future__ import annotations

from sqlalchemy.engine import URL, Dialect

from ..errors import InvalidSetting

#: Of each kind of database, what can be awaited.
AWAITED: dict[str, tuple[str, ...]] = {
    "postgresql": ("postgresql+asyncpg", "postgresql+psycopg"),
    "mysql": ("mysql+asyncmy", "mysql+aiomysql"),
    "mariadb": ("mariadb+asyncmy", "mariadb+aiomysql"),
    "sqlite": ("sqlite+aiosqlite",),
    "oracle": ("oracle+oracledb_async",),
    "mssql": ("mssql+aioodbc",),
}
_NAMED_ALIKE = {"psycopg_async": "psycopg", "oracledb_async": "oracledb"}
"""One driver with two sides, of which SQLAlchemy has a name for the awaited one too."""


def awaited_dialect(url: URL) -> type[Dialect]:
    """Return the dialect whose connections are awaited: `postgresql+psycopg` has one of each kind."""
    return url.get_dialect().get_async_dialect_cls(url)


def can_be_awaited(url: URL) -> bool:
    """Tell whether an AsyncEngine can be made of `url`."""
    return bool(awaited_dialect(url).is_async)


def has_sync_side(url: URL) -> bool:
    """Tell whether an Engine for ordinary functions can be made of `url`."""
    return not url.get_dialect().is_async or url.get_driver_name() in _NAMED_ALIKE


def sync_url(url: URL) -> URL:
    """Return the URL of the same database, with the same driver, for ordinary functions."""
    name = _NAMED_ALIKE.get(url.get_driver_name())
    return url if name is None else url.set(drivername=f"{url.get_backend_name()}+{name}")


def refuse_what_blocks(url: URL, setting: str) -> None:
    """Refuse a URL whose driver blocks the event loop while it waits for the server; connects to nothing.

    Raises:
        InvalidSetting: names `setting`, and the URL to write instead.
    """
    if not can_be_awaited(url):
        raise InvalidSetting(f"{setting} begins with {url.drivername!r}: {what_to_write(url)}")


def what_to_write(url: URL) -> str:
    """Return why `url` cannot be awaited, and what it should begin with; the rest of it stays as it is."""
    driver = url.get_dialect().driver
    known = AWAITED.get(url.get_backend_name())
    if known is None:
        names = ", ".join(name for names in AWAITED.values() for name in names)
        return f"{driver} cannot be awaited. Known to be: {names}."
    return f"{driver} cannot be awaited; write {' or '.join(known)}."
