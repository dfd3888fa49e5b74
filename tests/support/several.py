"""A second database beside that of the tests."""

from typing import Any

from support.databases import PostgreSQL

MODULES = ("endings", "transient", "several")


def settings(there: PostgreSQL, **more: Any) -> dict[str, Any]:
    """Return the setting that calls the other database reports."""
    return {"alchemy_databases": {"reports": {"url": there.url("reports"), **more}}}
