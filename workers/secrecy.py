"""Keep passwords out of what is shown of a configuration: `celery report`, `celery inspect conf`, our own messages.

No text is searched for passwords. What is known to hold none is shown: names, numbers, classes, a few words, and of a
URL the host and the database that a parser finds in it. Anything else is masked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from celery import Celery
from celery.app.utils import Settings, filter_hidden_settings
from sqlalchemy.engine import URL

from ..strategies.drivers.url import shown_text
from ._celery import conf_so_far

PREFIX = "alchemy_"
"""Of all our settings."""
MASK = "*" * 8
_SECRET_NAME = re.compile(r"api|token|key|secret|pass|pwd|dsn|conninfo|credential", re.IGNORECASE)
#: What a name can be written with: of a database, a strategy, an option, a class in a module.
_NAME = re.compile(r"[\w.: -]+")
_DATABASES = "alchemy_databases"
_URLS = frozenset({"url", "replica_url"})
#: Settings whose text is a name.
_NAMES = frozenset({"alchemy_session_strategy", "alchemy_metrics", "alchemy_external_pooler"})
#: Values of options that are worth showing, and are no secret.
_WORDS = frozenset(
    {"auto", "autocommit", "read committed", "read uncommitted", "repeatable read", "serializable", "pgbouncer"}
)


def mask_reports(app: Celery) -> None:
    """Mask our settings in whatever Celery prints of the configuration of `app`, and of no other app."""
    app.on_after_configure.connect(
        _on_after_configure, sender=app, weak=False, dispatch_uid="celery_alchemy.mask_reports"
    )
    conf = conf_so_far(app)
    if conf is not None:
        _mask(conf)


def _on_after_configure(source: Any = None, **_: Any) -> None:
    _mask(source)


def _mask(conf: Any) -> None:
    """Let `conf` mask our settings in its reports; what it holds is not touched."""
    if isinstance(conf, Settings) and not isinstance(conf, MaskingSettings):
        object.__setattr__(conf, "__class__", _masking(type(conf)))  # an ordinary assignment would be a setting


class MaskingSettings(Settings):  # type: ignore[misc]
    """The settings of an app that has an Alchemy; also what `copy()` makes of them."""

    def table(self, with_defaults: bool = False, censored: bool = True) -> dict[str, Any]:
        """Return the settings for a report, as Celery does; what could be a password of ours is masked."""
        found: dict[str, Any] = super().table(with_defaults, censored=False)
        if censored:
            shown = {name: masked_setting(name, value) if is_ours(name) else value for name, value in found.items()}
            found = filter_hidden_settings(shown)
        return found


def _masking(kind: type[Settings]) -> type[Settings]:
    return MaskingSettings if kind is Settings else type(kind.__name__, (MaskingSettings, kind), {})


def is_ours(name: object) -> bool:
    """Tell whether a setting is ours, or sounds like one: misspelled ones hold passwords too."""
    return isinstance(name, str) and PREFIX in name.lower()


def masked_setting(name: str, value: Any) -> Any:
    """Return `value` of the setting `name`, as its configuration spells it, without what could be a password."""
    key = PREFIX + name.lower().rpartition(PREFIX)[2]
    if key == _DATABASES and isinstance(value, Mapping):
        return {masked_name(name): _masked_database(given) for name, given in value.items()}
    if key in _NAMES:
        return _masked_names(value)
    return masked(value)


def _masked_database(given: Any) -> Any:
    if isinstance(given, str | URL):
        return shown_text(given) or MASK
    if not isinstance(given, Mapping):
        return masked(given)
    return {
        masked_name(name): _masked_database(value)
        if name in _URLS and isinstance(value, str | URL)
        else masked_setting(f"{PREFIX}{name}", value)
        for name, value in given.items()
    }


def _masked_names(value: Any) -> Any:
    if isinstance(value, str):
        return masked_name(value)
    if isinstance(value, Mapping):
        return {masked_name(name): _masked_names(inner) for name, inner in value.items()}
    return masked(value)


def masked_name(name: object) -> str:
    """Return `name` where it can be one; a URL or a DSN that stands in its place is masked."""
    return name if isinstance(name, str) and _NAME.fullmatch(name) else MASK


def masked(value: Any) -> Any:
    """Return `value` without anything that could be a password; what is neither text nor number becomes its type."""
    if isinstance(value, Mapping):
        return {
            masked_name(name): MASK if isinstance(name, str) and _SECRET_NAME.search(name) else masked(inner)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset) and not isinstance(value, URL):
        return [masked(inner) for inner in value]
    if isinstance(value, str | URL):
        return value if isinstance(value, str) and value.lower() in _WORDS else MASK
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return f"<{type(value).__name__}>"


def in_words(value: Any) -> str:
    """Return `value`, which is none that its setting may have, for a message."""
    if isinstance(value, str):
        return repr(masked_name(value)) if value else "''"
    return repr(masked(value))
