"""Which session strategy serves which worker pool, and who said so."""

from __future__ import annotations

import difflib
import inspect
from importlib.metadata import entry_points
from typing import Any

from kombu.utils.imports import symbol_by_name

from ..strategies import LocalStrategy, PerProcessStrategy, ScopedStrategy, SessionStrategy, WorkerPool
from .errors import ConfigurationError
from .secrecy import in_words, masked_name

GROUP = "celery_alchemy.strategies"
AUTO = "auto"
SETTING = "alchemy_session_strategy"
OPTION = "--session-strategy"

_OURS: dict[str, type[SessionStrategy]] = {
    strategy.name: strategy for strategy in (LocalStrategy, ScopedStrategy, PerProcessStrategy)
}
_AUTO: dict[str, tuple[type[SessionStrategy], str]] = {
    "prefork": (PerProcessStrategy, "prefork forks, and an Engine must not cross the fork"),
    "threads": (ScopedStrategy, "threads share one process, and a Session must not be shared"),
    "gevent": (ScopedStrategy, "greenlets share one process, and a Session must not be shared"),
    "eventlet": (ScopedStrategy, "greenlets share one process, and a Session must not be shared"),
    "asyncio": (ScopedStrategy, "its `def` tasks run in threads, and a Session must not be shared"),
    "solo": (LocalStrategy, "solo runs one task at a time in one process"),
}
_AUTO_OTHER = (LocalStrategy, "a Session per task request is right wherever it runs")

Choice = tuple[type[SessionStrategy], str]


def automatic() -> dict[str, str]:
    """Return the name of the strategy that `auto` chooses, by worker pool; any other worker pool gets `local`."""
    return {pool: strategy.name for pool, (strategy, _) in _AUTO.items()}


def choose(setting: str | dict[str, str], option: str | None, worker_pool: WorkerPool) -> Choice:
    """Return the strategy for `worker_pool` and, in words, why.

    Args:
        setting: `alchemy_session_strategy`: a name, `package.module:Class`, or a dict from worker pool to these.
        option: `--session-strategy` of the worker, which overrides the setting.

    Raises:
        ConfigurationError: nobody knows the name, or the strategy says that it cannot serve this worker pool.
    """
    if option is not None:
        found = _named(option, OPTION, worker_pool)
    elif isinstance(setting, dict):
        found = _from_dict(setting, worker_pool)
    else:
        found = _named(setting, SETTING, worker_pool)
    strategy, _ = found
    refusal = strategy.refuses(worker_pool)
    if refusal:
        raise ConfigurationError(
            f"The session strategy {strategy.name!r} cannot serve the worker pool {worker_pool.name!r}: {refusal}. "
            f"Choose another with {SETTING}, or leave it at 'auto'."
        )
    return found


def _from_dict(setting: dict[str, str], worker_pool: WorkerPool) -> Choice:
    known = set(_AUTO) | {"custom", "none"}
    for pool_name, strategy_name in setting.items():
        where = f"{SETTING}[{pool_name!r}]"
        if pool_name not in known:
            near = difflib.get_close_matches(pool_name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigurationError(f"{where}: {pool_name!r} is not a worker pool.{hint} Known: {_list(known)}.")
        _named(strategy_name, where, worker_pool)
    name = setting.get(worker_pool.name, AUTO)
    return _named(name, f"{SETTING}[{worker_pool.name!r}]", worker_pool)


def _named(name: Any, where: str, worker_pool: WorkerPool) -> Choice:
    if name == AUTO:
        strategy, why = _AUTO.get(worker_pool.name, _AUTO_OTHER)
        return strategy, f"auto: {why}"
    reason = f"set by {where}"
    if not isinstance(name, str) or masked_name(name) != name:
        raise ConfigurationError(f"{where} is {in_words(name)}, but it must be the name of a session strategy.")
    if name in _OURS:
        return _OURS[name], reason
    if ":" in name:
        return _loaded(name, where, lambda: symbol_by_name(name)), reason
    registered = {point.name: point for point in entry_points(group=GROUP)}
    if name in registered:
        return _loaded(name, where, registered[name].load), reason
    known = [*_OURS, *sorted(set(registered) - set(_OURS))]
    near = difflib.get_close_matches(name, [*known, AUTO], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigurationError(
        f"{where}={name!r} is not a session strategy.{hint} Known: {', '.join(known)}; "
        f"or 'auto', or 'package.module:Class'."
    )


def _loaded(name: str, where: str, load: Any) -> type[SessionStrategy]:
    try:
        strategy = load()
    except Exception as error:
        raise ConfigurationError(f"{where}={name!r} cannot be imported: {type(error).__name__}: {error}.") from error
    if not (isinstance(strategy, type) and issubclass(strategy, SessionStrategy)) or inspect.isabstract(strategy):
        raise ConfigurationError(
            f"{where}={name!r} is {strategy!r}, which is not a complete subclass of celery_alchemy.SessionStrategy."
        )
    return strategy


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names))
