"""The arguments of a message that waits: refused, warned of, and copied as the receiver will see them."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from celery import Celery
from kombu import serialization
from kombu.exceptions import EncodeError
from sqlalchemy import Row
from sqlalchemy import inspect as inspect_model
from sqlalchemy.orm import InstanceState, Session, scoped_session

from ...strategies.engines.leaks import describe, find_origin
from ...strategies.errors import CeleryAlchemyError
from ...strategies.names import type_of
from ..errors import UnencodableArgument

logger: logging.Logger = logging.getLogger(__name__)

PLAIN = frozenset({bool, int, float, str})
"""Types of arguments that JSON gives back as they are, that nothing can change meanwhile, and of which none is a
mistake."""
_FLAT = PLAIN | {type(None)}
_SEQUENCES = frozenset({tuple, list, type({}.values())})
_LOOKED_AT = 100
"""Objects that wait for a flush, at most so many are looked at."""
#: Whose code calls ours on behalf of the user's.
_LIBRARIES = ("celery.", "kombu.", "sentry_sdk.")
#: The places that have been warned of.
_warned: set[object] = set()


def are_plain(args: Any, kwargs: Any) -> bool:
    """Tell whether all arguments are numbers and strings, as most are: none is late, a Session or None, and JSON gives
    each back as it is."""
    if args:
        if type(args) is not tuple and type(args) is not list:
            return False
        for value in args:
            if type(value) not in PLAIN:
                return False
    if kwargs:
        if type(kwargs) is not dict:
            return False
        for value in kwargs.values():
            if type(value) not in PLAIN:
                return False
    return True


def snapshot(app: Celery, args: Any, kwargs: Any, options: dict[str, Any], plain: bool = False) -> tuple[Any, Any]:
    """Return the arguments as the receiver will see them.

    Args:
        plain: They are plain.
    Raises:
        kombu.exceptions.EncodeError: they cannot be serialised.
    """
    serializer = options.get("serializer") or app.conf.task_serializer
    if serializer == "json" and (plain or (_is_flat(args) and _is_flat(kwargs.values() if kwargs else None))):
        return (tuple(args) if args is not None else None), (dict(kwargs) if kwargs is not None else None)
    with explaining(args, kwargs):
        content_type, encoding, data = serialization.dumps((args, kwargs), serializer)
    copied_args, copied_kwargs = serialization.loads(data, content_type, encoding, accept=[content_type])
    return (tuple(copied_args) if copied_args is not None else None), copied_kwargs


@contextmanager
def explaining(args: Any, kwargs: Any) -> Iterator[None]:
    """Name the argument that cannot be serialised, where the block finds one, and say what to pass instead."""
    try:
        yield
    except EncodeError as error:
        explain(error, args, kwargs)
        raise


def explain(error: EncodeError, args: Any, kwargs: Any) -> None:
    """Raise an error that names the argument which cannot be serialised and what to pass instead, if it is known.

    Raises:
        UnencodableArgument: from `error`.
    """
    if isinstance(error, UnencodableArgument):
        return
    for place, value in [*enumerate(args or (), 1), *(kwargs or {}).items()]:
        for one in [value, *_members(value)]:
            if (advice := _instead_of(one)) is not None:
                where = f"Argument {place}" if isinstance(place, int) else f"The argument {place}="
                verb = "is" if one is value else "has"
                raise UnencodableArgument(f"{error}. {where} {verb} {advice}") from error


def _members(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple | set | frozenset) else []


def _instead_of(value: Any) -> str | None:
    """Say what `value` is and what is passed instead of it; None where there is nothing to say."""
    if isinstance(value, FunctionType):
        return (
            "a function. One that makes an argument before the COMMIT is written late(lambda: user.id), with `from "
            "celery_alchemy import late`."
        )
    if is_session(value):
        return f"{type_of(value)}, which cannot be sent. Leave it out: the task that is sent has a Session of its own."
    if isinstance(value, Row):
        return "a Row, which cannot be sent. Pass its values: row.id, or list(row)."
    state = inspect_model(value, raiseerr=False)
    if not isinstance(state, InstanceState):
        return None
    keys = [state.mapper.get_property_by_column(column).key for column in state.mapper.primary_key]
    return f"{type_of(value)}, which cannot be sent. Pass its primary key ({', '.join(keys)}), and load it in the task."


def _is_flat(values: Any) -> bool:
    """Tell whether `values` are such that JSON gives them back as they are, and nobody can change them meanwhile."""
    return not values or (type(values) in _SEQUENCES and all(type(value) in _FLAT for value in values))


def refuse_sessions(name: str, args: Any, kwargs: Any) -> None:
    """Refuse a Session among the arguments of `name`: it is one of ours that was meant.

    Raises:
        CeleryAlchemyError: says how to wait for its COMMIT.
    """
    given = [*enumerate(args or (), 1), *(kwargs or {}).items()]
    for place, value in given:
        if is_session(value):
            where = f"argument {place}" if isinstance(place, int) else f"{place}="
            raise CeleryAlchemyError(
                f"{name} was given {type_of(value)} as {where}: a Session cannot be sent. To send after its "
                f"COMMIT, write apply_async_on_commit((...), session=session); the arguments of the task are a tuple "
                f"there, and delay_on_commit has no options. In a unit of work leave the Session out."
            )


def is_session(value: Any) -> bool:
    """Tell whether `value` is a Session, or stands for one."""
    if isinstance(value, Session | scoped_session):
        return True
    asyncio = sys.modules.get("sqlalchemy.ext.asyncio")  # not imported for this: it may bring greenlet
    return asyncio is not None and isinstance(value, asyncio.AsyncSession | asyncio.async_scoped_session)


def warn_of_none(session: Session | None, name: str, task: Any, args: Any, kwargs: Any) -> None:
    """Warn, once for each place, where an argument is None and `session` has new objects that have no id yet.

    Args:
        session: Whose COMMIT is waited for; None where it has not been used.
        name: Of the task.
        task: The task itself, where it is known here.
    """
    given = [*enumerate(args or ()), *(kwargs or {}).items()]
    nones = [place for place, value in given if value is None]
    if not nones or session is None or not session.new:
        return
    without_id = sorted({type(one).__name__ for one in list(session.new)[:_LOOKED_AT] if _has_no_id(one)})
    origin = find_origin(_LIBRARIES)
    if not without_id or origin in _warned:
        return
    _warned.add(origin)
    logger.warning(
        "%s is sent with %s, and the Session has objects without an id, for they are not flushed yet: %s. An id that "
        "was read from one of them is None. Call flush() on the Session before, or pass late(lambda: ...), which is "
        "called after the flush. At %s; said once.",
        name, " and ".join(f"{_parameter(task, place)} = None" for place in nones), ", ".join(without_id),
        describe(origin),
    )  # fmt: skip


def _has_no_id(one: Any) -> bool:
    mapper = inspect_model(one).mapper
    return None in mapper.primary_key_from_instance(one)


def _parameter(task: Any, place: int | str) -> str:
    """Name an argument as its task does."""
    if isinstance(place, str):
        return place
    try:
        names = list(inspect.signature(task.run).parameters)
        return names[place]
    except (AttributeError, IndexError, TypeError, ValueError):
        return f"argument {place + 1}"
