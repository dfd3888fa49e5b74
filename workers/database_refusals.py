"""What a database is asked for and cannot do."""

from __future__ import annotations

from sqlalchemy.engine import Dialect, Engine

from ..strategies.engines import statement_timeout
from ..strategies.features import reset_on_return
from ..strategies.names import type_of
from ..strategies.options import DatabaseOptions
from .errors import ConfigurationError
from .settings import DEFAULT, Settings


def refuse_what_it_cannot(settings: Settings, options: DatabaseOptions, dialect: type[Dialect]) -> None:
    """Refuse settings that this database, or its driver, cannot do.

    Raises:
        ConfigurationError: names the setting and the remedy.
    """
    limit_s = settings.statement_timeout_s
    if limit_s is not None and not statement_timeout.supports(dialect):
        raise ConfigurationError(
            f"alchemy_statement_timeout_s={limit_s!r}, but the database {options.database!r} is "
            f"{dialect.name}, which stops no statement by itself; {', '.join(statement_timeout.SUPPORTED)} do. "
            f"Leave it out."
        )
    if settings.external_pooler and dialect.name != "postgresql":
        raise ConfigurationError(
            f"alchemy_external_pooler={settings.external_pooler!r}, but the database {options.database!r} is "
            f"{dialect.name}: PgBouncer is for PostgreSQL. Leave it out."
        )
    refusal = reset_on_return.why_not(dialect, options) if options.reset_on_return else None
    if refusal is not None:
        raise ConfigurationError(
            f"alchemy_reset_on_return=True, but the sessions of the database {options.database!r} cannot be reset: "
            f"{refusal}. Leave it out; 'reset_on_return' in alchemy_databases says it for one database."
        )


def refuse_async(engine: object) -> None:
    """Refuse an Engine of the user's that is none for ordinary functions.

    Raises:
        ConfigurationError: says what to write; for `async def` tasks too.
    """
    awaited = (
        "`async def` tasks have an AsyncEngine for each event loop, made by celery-alchemy: set "
        "app.conf.alchemy_database_url, put what create_async_engine() got into alchemy_engine_options, and listeners "
        "into @db.on_engine."
    )
    if not isinstance(engine, Engine):
        raise ConfigurationError(
            f"Alchemy(engine=...) got {type_of(engine)}, but ordinary tasks need a sqlalchemy.Engine, made by "
            f"create_engine() with a sync driver. {awaited}"
        )
    if engine.dialect.is_async:
        raise ConfigurationError(
            f"Alchemy(engine=...) got the Engine inside an AsyncEngine. Ordinary tasks need an Engine made by "
            f"create_engine() with a sync driver. {awaited}"
        )


def no_database(database: str) -> str:
    """Return what to say where nothing tells which server the database `database` is on."""
    if database == DEFAULT:
        return (
            "No database: set app.conf.alchemy_database_url, for example to "
            "'postgresql+psycopg://localhost/shop', or bring an Engine with Alchemy(app, engine=engine)."
        )
    return (
        f"No URL for the database {database!r}: put it into app.conf.alchemy_databases, for example "
        f"{{{database!r}: 'postgresql+psycopg://localhost/{database}'}}, or bring an Engine with "
        f"Alchemy(app, database={database!r}, engine=engine)."
    )
