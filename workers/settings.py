"""The settings: read from the app's configuration, checked, and nothing else."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import UnionType
from typing import Any, Literal

from celery import Celery
from sqlalchemy.engine import URL
from sqlalchemy.orm import Session
from sqlalchemy.pool import Pool

from ..strategies.names import type_of
from .errors import ConfigurationError
from .secrecy import PREFIX, in_words, masked_name

#: Name, types it may have, in words.
_KNOWN: dict[str, tuple[tuple[type, ...], str]] = {
    "alchemy_database_url": ((str, URL), "a URL such as 'postgresql+psycopg://localhost/shop'"),
    "alchemy_replica_database_url": ((str, URL), "the URL of a database that read_only=True tasks read from"),
    "alchemy_databases": ((Mapping,), "a dict from a database's name to its URL, or to a dict with 'url' and more"),
    "alchemy_engine_options": ((Mapping,), "a dict of create_engine's keyword arguments"),
    "alchemy_session_options": ((Mapping,), "a dict of Session's keyword arguments"),
    "alchemy_session_strategy": ((str, Mapping), "a strategy's name, or a dict from worker pool to name"),
    "alchemy_commit_on_success": ((bool,), "True or False"),
    "alchemy_enqueue_on_commit": ((bool,), "True or False"),
    "alchemy_on_commit_outside": ((str,), "'warn', 'send' or 'raise'"),
    "alchemy_outbox": ((bool, str), "True, False or 'relay'"),
    "alchemy_outbox_table": ((str,), "the name of the outbox's table, with its schema: 'shop.messages'"),
    "alchemy_outbox_attempts": ((int,), "a whole number, 1 or more"),
    "alchemy_outbox_resend_s": ((int, float), "a number of seconds, 0 or more"),
    "alchemy_exactly_once": ((bool, str), "True, False, 'first' or 'last'"),
    "alchemy_completed_table": ((str,), "the name of the table of completed tasks, with its schema: 'shop.completed'"),
    "alchemy_completed_kept_s": ((int, float), "a number of seconds above 0"),
    "alchemy_two_phase": ((bool,), "True or False"),
    "alchemy_isolation_retries": ((int,), "a whole number, 0 or more"),
    "alchemy_statement_timeout_s": ((int, float), "a number of seconds above 0"),
    "alchemy_application_name": ((bool,), "True or False"),
    "alchemy_external_pooler": ((str,), "'pgbouncer'"),
    "alchemy_reset_on_return": ((bool,), "True or False"),
    "alchemy_begin_with_first_statement": ((bool, str), "'auto', True or False"),
    "alchemy_warn_idle_s": ((int, float), "a number of seconds above 0"),
    "alchemy_warn_blocked_s": ((int, float), "a number of seconds above 0"),
    "alchemy_metrics": ((str,), "'opentelemetry' or 'package.module:observer'"),
}

DEFAULT = "default"
"""The name of the database that `self.db` is of."""
#: What a database in `alchemy_databases` may say: the setting of the default database that it stands for.
_OF_DATABASE = {
    "url": "alchemy_database_url",
    "replica_url": "alchemy_replica_database_url",
    "engine_options": "alchemy_engine_options",
    "session_options": "alchemy_session_options",
    "session_strategy": "alchemy_session_strategy",
    "external_pooler": "alchemy_external_pooler",
    "reset_on_return": "alchemy_reset_on_return",
}


#: Options of create_engine that environment variables like to turn into strings: their type, the least value, in words.
_NUMBERS: dict[str, tuple[type[int] | UnionType, int, str]] = {
    "pool_size": (int, 0, "a whole number, 0 or more (0: no limit)"),
    "max_overflow": (int, -1, "a whole number, -1 or more (-1: no limit)"),
    "pool_recycle": (int, -1, "a number of seconds, -1 for never"),
    "pool_timeout": (int | float, 0, "a number of seconds"),
}
#: And its others that people set; each belongs into `alchemy_engine_options`.
_ENGINE_OPTIONS = (
    *_NUMBERS, "connect_args", "creator", "echo", "echo_pool", "execution_options", "hide_parameters",
    "isolation_level", "json_deserializer", "json_serializer", "logging_name", "pool_pre_ping",
    "pool_reset_on_return", "pool_use_lifo", "poolclass", "query_cache_size", "use_insertmanyvalues",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user configured, checked for names and types; URLs and options are tried when an Engine is made."""

    database_url: str | URL | None = field(default=None, repr=False)
    replica_database_url: str | URL | None = field(default=None, repr=False)
    engine_options: dict[str, Any] = field(default_factory=dict, repr=False)
    session_options: dict[str, Any] = field(default_factory=dict, repr=False)
    session_strategy: str | dict[str, str] = "auto"
    commit_on_success: bool = True
    enqueue_on_commit: bool = False
    on_commit_outside: str = "warn"
    outbox: bool | Literal["relay"] = False
    outbox_table: str | None = None
    outbox_attempts: int = 10
    outbox_resend_s: float | None = None
    exactly_once: bool | Literal["first", "last"] = False
    completed_table: str | None = None
    completed_kept_s: float = 7 * 24 * 3600.0
    two_phase: bool = False
    isolation_retries: int = 0
    statement_timeout_s: float | None = None
    application_name: bool = False
    external_pooler: str | None = None
    reset_on_return: bool = False
    begin_with_first_statement: bool | Literal["auto"] = "auto"
    warn_idle_s: float | None = None
    warn_blocked_s: float = 1.0
    metrics: str | None = None
    databases: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    """What each database says of its own, by its name, in the order in which they are declared."""

    def of(self, database: str) -> Settings:
        """Return the settings of one database: its own, and those of the app that are not of one server."""
        if database == DEFAULT:
            return self
        here = replace(self, database_url=None, replica_database_url=None, engine_options={}, external_pooler=None)
        own = self.databases.get(database, {})
        return replace(here, **{_OF_DATABASE[name].removeprefix(PREFIX): value for name, value in own.items()})


def read_settings(app: Celery) -> Settings:
    """Return the settings of `app`, from whatever its configuration is: module, object, dict, Django, namespaced.

    Raises:
        ConfigurationError: an unknown `alchemy_*` key, or a value of the wrong type. No value is shown that could hold
            a password.
    """
    _refuse_unknown(app)
    values: dict[str, Any] = {}
    for key in _KNOWN:
        value = app.conf.get(key)
        if value is not None:
            values[key.removeprefix(PREFIX)] = _checked(key, value, _spelling(app, key))
    if "databases" in values:
        _read_databases(values, _spelling(app, "alchemy_databases"))
    return Settings(**values)


def read_on_commit_outside(app: Celery) -> str:
    """Return what becomes of a message that is to wait for a COMMIT where there is nothing to wait for.

    The other settings are not looked at: a program that only sends may have none that are right.

    Raises:
        ConfigurationError: the value is none of the three.
    """
    value = app.conf.get("alchemy_on_commit_outside")
    key = "alchemy_on_commit_outside"
    found: str = _checked(key, value, _spelling(app, key)) if value is not None else "warn"
    return found


def _checked(key: str, value: Any, spelling: str) -> Any:
    """Return `value` of the setting `key`, written as `spelling`; a Mapping as a dict of its own."""
    types, meaning = _KNOWN[key]
    if (
        not isinstance(value, types)
        or (bool not in types and isinstance(value, bool))
        or _is_none_of_its_values(key, value)
    ):
        shown = type_of(value) if _may_hide_password(key) else in_words(value)
        raise ConfigurationError(f"{spelling} is {shown}, but it must be {meaning}.")
    if not isinstance(value, Mapping):
        return value
    bad = [name for name in value if not isinstance(name, str) or masked_name(name) != name]
    if bad:
        raise ConfigurationError(f"{spelling} has the key {in_words(bad[0])}, but its keys must be strings: names.")
    value = dict(value)
    if key == "alchemy_engine_options":
        _check_engine_options(value, spelling)
    return value


_SECONDS = {"alchemy_statement_timeout_s", "alchemy_warn_blocked_s", "alchemy_warn_idle_s"}
_LONGEST_KEPT_S = 100 * 366 * 24 * 3600
_LONGEST_S = 2_147_483  # PostgreSQL counts milliseconds, in 31 bits


def _is_none_of_its_values(key: str, value: Any) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return True
    return (
        (key == "alchemy_isolation_retries" and value < 0)
        or (key == "alchemy_outbox" and isinstance(value, str) and value != "relay")
        or (key == "alchemy_outbox_attempts" and value < 1)
        or (key == "alchemy_outbox_resend_s" and not 0 <= value <= _LONGEST_S)
        or (key == "alchemy_exactly_once" and isinstance(value, str) and value not in {"first", "last"})
        or (key == "alchemy_completed_kept_s" and not 0 < value <= _LONGEST_KEPT_S)
        or (
            key in {"alchemy_outbox_table", "alchemy_completed_table"}
            and (not value.rpartition(".")[2] or masked_name(value) != value)
        )
        or (key in _SECONDS and not 0 < value <= _LONGEST_S)
        or (key == "alchemy_metrics" and value != "opentelemetry" and (":" not in value or masked_name(value) != value))
        or (key == "alchemy_on_commit_outside" and value not in {"warn", "send", "raise"})
        or (key == "alchemy_external_pooler" and value != "pgbouncer")
        or (key == "alchemy_begin_with_first_statement" and isinstance(value, str) and value != "auto")
    )


def _read_databases(values: dict[str, Any], spelling: str) -> None:
    """Check `alchemy_databases`, and let its "default" be what the flat settings say."""
    databases = values["databases"] = {
        name: _database(given, f"{spelling}[{name!r}]") for name, given in values["databases"].items()
    }
    for name, value in databases.get(DEFAULT, {}).items():
        flat = _OF_DATABASE[name].removeprefix(PREFIX)
        if flat in values:
            raise ConfigurationError(
                f"{spelling}[{DEFAULT!r}] says {name!r}, and so does {_OF_DATABASE[name]}. Leave one of them out."
            )
        values[flat] = value


def _database(given: Any, spelling: str) -> dict[str, Any]:
    if isinstance(given, str | URL):
        return {"url": given}
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"{spelling} is {type_of(given)}, but it must be a URL, or a dict with 'url'.")
    found: dict[str, Any] = {}
    for name, value in given.items():
        key = _OF_DATABASE.get(name)
        if key is None:
            near = difflib.get_close_matches(str(name), _OF_DATABASE, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigurationError(
                f"{spelling} has the key {in_words(name)}, which is none of a database.{hint} Known: "
                f"{', '.join(_OF_DATABASE)}; keyword arguments of create_engine go into 'engine_options'."
            )
        if value is not None:
            found[name] = _checked(key, value, f"{spelling}[{name!r}]")
    return found


def _check_engine_options(options: dict[str, Any], spelling: str) -> None:
    for name, (types, least, meaning) in _NUMBERS.items():
        if name in options:
            value: Any = options[name]
            if not isinstance(value, types) or isinstance(value, bool) or value < least:
                raise ConfigurationError(f"{spelling}[{name!r}] is {in_words(value)}, but it must be {meaning}.")
    if not isinstance(options.get("connect_args", {}), Mapping):
        raise ConfigurationError(f"{spelling}['connect_args'] must be a dict of the driver's keyword arguments.")
    poolclass = options.get("poolclass")
    if poolclass is not None and not (isinstance(poolclass, type) and issubclass(poolclass, Pool)):
        raise ConfigurationError(
            f"{spelling}['poolclass'] is {in_words(poolclass)}, but it must be a class from sqlalchemy.pool."
        )
    creator = options.get("creator")
    if creator is not None and not callable(creator):
        raise ConfigurationError(f"{spelling}['creator'] must be a callable that returns a connection.")


def _may_hide_password(key: str) -> bool:
    return "database" in key or "options" in key


def _spelling(app: Celery, key: str) -> str:
    """Return `key` as this app's configuration spells it."""
    namespace = app.namespace
    return f"{namespace}_{key.upper()}" if namespace and namespace.isupper() else key


def _home_of(name: str) -> tuple[str, str] | None:
    """Return the setting that takes `name`, a keyword argument of `create_engine` or `Session`, and that argument."""
    for setting, names in (
        ("alchemy_engine_options", _ENGINE_OPTIONS),
        ("alchemy_session_options", inspect.signature(Session).parameters),
    ):
        if near := difflib.get_close_matches(name, names, n=1, cutoff=0.9):
            return setting, near[0]
    return None


def _refuse_unknown(app: Celery) -> None:
    """Refuse keys that are meant for us and would have no effect; keys of others that sound alike are theirs."""
    namespace = f"{app.namespace}_".lower() if app.namespace else ""
    for raw in list(app.conf.keys()):
        if not isinstance(raw, str) or app.conf.get(raw) is None:
            continue
        lowered = raw.lower()
        key = lowered.removeprefix(namespace)
        if not key.startswith(PREFIX):
            continue
        ours = raw == key or (namespace and lowered != key)  # alchemy_x, or CELERY_ALCHEMY_X
        near = difflib.get_close_matches(key, _KNOWN, n=1, cutoff=0.5 if ours else 0.85)
        home = _home_of(key.removeprefix(PREFIX))
        if key in _KNOWN:
            if not ours:
                raise ConfigurationError(f"{raw} has no effect as it is spelled. Write {_spelling(app, key)!r}.")
        elif (ours and not callable(app.conf.get(raw))) or (not ours and near):
            hint = f" Did you mean {_spelling(app, near[0])!r}?" if near else ""
            if home is not None:
                hint = f" Write {_spelling(app, home[0])} = {{{home[1]!r}: ...}}."
            known = ", ".join(_spelling(app, name) for name in _KNOWN)
            raise ConfigurationError(f"{raw} is not a setting of celery-alchemy.{hint} Known: {known}.")
