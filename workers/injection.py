"""The Session as an argument: a parameter that callers do not see, and that the task finds filled."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Container
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union

from celery.utils.functional import head_from_fun
from sqlalchemy.orm import Session, scoped_session

from ._celery import pydantic_dump, set_pydantic_dump
from .errors import ConfigurationError
from .settings import DEFAULT


@dataclass(frozen=True, slots=True)
class UseDatabase:
    """Marks a parameter of a task that receives the Session on a database of the app:

    @app.task(base=DatabaseTask)
    def report(day: str, session: CurrentSession, reports: Annotated[Session, UseDatabase("reports")]) -> None: ...
    """

    name: str = DEFAULT


CurrentSession = Annotated[Session, UseDatabase()]
"""Annotation of a task's parameter that receives the Session of the task request:

    @app.task(base=DatabaseTask)
    def create(name: str, session: CurrentSession) -> int: ...

    create.delay("ada")

Callers do not see it: it is no part of the task's signature, and not to be sent. Where the task is called like a
function, in a test for example, it may be passed by hand, by name or at its place."""


def injected_parameters(run: Any) -> dict[str, str]:
    """Return the parameters of `run` that receive a Session: the database of each, by its name."""
    annotations = _annotations_of(run)
    found = {name: _database_of(annotation) for name, annotation in annotations.items() if name != "return"}
    return {name: database for name, database in found.items() if database is not None}


def refuse_other_kind(name: str, run: Any, *, is_async: bool) -> None:
    """Refuse a parameter of `run`, the function of the task `name`, that is annotated with the other kind of Session.

    Raises:
        ConfigurationError: names the task, the parameter and both remedies.
    """
    asynchronous: Any = sys.modules.get("sqlalchemy.ext.asyncio")  # none where nothing is annotated with it
    ordinary = (Session, scoped_session)
    awaited = (asynchronous.AsyncSession, asynchronous.async_scoped_session) if asynchronous is not None else ()
    annotations = _annotations_of(run)
    for parameter in injected_parameters(run):
        kind = _session_of(annotations[parameter])
        if not issubclass(kind, ordinary if is_async else awaited):
            continue
        there, right, base, given = (
            ("an `async def` task", "CurrentAsyncSession", "DatabaseTask", "an AsyncSession")
            if is_async
            else ("no `async def` task", "CurrentSession", "AsyncDatabaseTask", "a Session")
        )
        raise ConfigurationError(
            f"The parameter {parameter!r} of the task {name!r} is annotated with {kind.__name__}, but it is {there}, "
            f"and would get {given}. Write {right} (of another database: Annotated[{given.split()[-1]}, "
            f"UseDatabase(...)]); or make it {'an ordinary' if is_async else 'an `async def`'} function with "
            f"base={base}."
        )


@dataclass(frozen=True, slots=True)
class InjectedParameter:
    """Where a parameter that is filled stands among those of the function, the task not counted."""

    name: str
    index: int | None
    """None: it is passed by name only."""
    database: str


def places_of(signature: inspect.Signature, names: dict[str, str]) -> list[InjectedParameter]:
    """Return where the parameters in `names` stand in `signature`, whose first parameter is the task.

    Raises:
        ConfigurationError: one of them is `*args` or `**kwargs`.
    """
    places = []
    for index, parameter in enumerate(list(signature.parameters.values())[1:]):
        if parameter.name in names:
            if parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}:
                raise ConfigurationError(
                    f"*{parameter.name} is annotated with CurrentSession or UseDatabase, but a Session is passed for "
                    f"one parameter."
                )
            at = None if parameter.kind is parameter.KEYWORD_ONLY else index
            places.append(InjectedParameter(parameter.name, at, names[parameter.name]))
    return places


def injecting(
    call: Callable[..., Any], places: list[InjectedParameter], kinds: tuple[type, ...] = (Session, scoped_session)
) -> Callable[..., Any]:
    """Return `call`, a function that takes the task first, with the task's Session passed at `places`, where none of
    these `kinds` is passed by hand."""

    def call_with_session(task: Any, /, *args: Any, **kwargs: Any) -> Any:
        for place in places:
            if not _is_passed(place, args, kwargs, kinds):
                session = task.db if place.database == DEFAULT else task.session_for(place.database)
                args, kwargs = _filled(place, args, kwargs, session)
        return call(task, *args, **kwargs)

    return call_with_session


def _is_passed(
    place: InjectedParameter, args: tuple[Any, ...], kwargs: dict[str, Any], kinds: tuple[type, ...]
) -> bool:
    """Tell whether a caller has passed it by hand: by name, or a Session at its place."""
    at_place = args[place.index] if place.index is not None and place.index < len(args) else None
    return place.name in kwargs or isinstance(at_place, kinds)


def _filled(
    place: InjectedParameter, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
) -> tuple[tuple[Any, ...], Any]:
    if place.index is not None and place.index <= len(args):
        return (*args[: place.index], value, *args[place.index :]), kwargs
    return args, {**kwargs, place.name: value}


def hidden(signature: inspect.Signature, names: Container[str]) -> inspect.Signature:
    """Return `signature` as callers see it, without the parameters in `names`."""
    return signature.replace(parameters=[one for one in signature.parameters.values() if one.name not in names])


def hide_from_callers(cls: Any, places: list[InjectedParameter]) -> None:
    """Give the task the signature that `run` shows, and Celery its check of a caller's arguments from that.

    Celery has made its checks before the class, from the function with all its parameters.
    """
    bare = inspect.signature(cls.run)
    shown = bare.replace(parameters=list(bare.parameters.values())[1:])
    cls.__signature__ = shown
    if "__header__" in cls.__dict__:

        def visible(*args: Any, **kwargs: Any) -> None:
            """Stands for the task: only its signature is looked at."""

        visible.__signature__ = shown  # type: ignore[attr-defined]
        visible.__name__ = cls.__name__
        cls.__header__ = staticmethod(head_from_fun(visible, bound=False))
    if (dump := pydantic_dump(cls)) is not None:
        # Celery 5.7 binds a caller's arguments to all parameters before it dumps the models among them.
        set_pydantic_dump(cls, _dumping(getattr(dump, "__func__", dump), places))


def _dumping(dump: Callable[..., Any], places: list[InjectedParameter]) -> Callable[..., Any]:
    def dump_arguments(args: Any, kwargs: Any) -> Any:
        if not isinstance(args, list | tuple | None) or not isinstance(kwargs, dict | None):
            return dump(args, kwargs)
        filled_args, filled_kwargs = tuple(args or ()), dict(kwargs or {})
        for place in places:
            filled_args, filled_kwargs = _filled(place, filled_args, filled_kwargs, None)
        dumped_args, dumped_kwargs = dump(filled_args, filled_kwargs)
        left_out = {place.index for place in places if place.name not in filled_kwargs}
        names = {place.name for place in places}
        return (
            tuple(value for index, value in enumerate(dumped_args) if index not in left_out),
            {name: value for name, value in dumped_kwargs.items() if name not in names},
        )

    return dump_arguments


def _database_of(annotation: Any) -> str | None:
    """Return the database whose Session a parameter with this annotation receives; None: it receives none.

    `CurrentSession | None` is one too: None is what a caller may leave out.
    """
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        for found in annotation.__metadata__:
            if isinstance(found, UseDatabase):
                return found.name
        return _database_of(annotation.__origin__)
    if origin in {Union, UnionType}:
        return next((name for name in map(_database_of, typing.get_args(annotation)) if name is not None), None)
    return None


def _session_of(annotation: Any) -> type:
    """Return the class of Session that a parameter with this annotation is to receive; `object` where it says none."""
    if typing.get_origin(annotation) is Annotated:
        return _session_of(annotation.__origin__)
    if typing.get_origin(annotation) in {Union, UnionType}:
        kinds = [one for one in typing.get_args(annotation) if _database_of(one) is not None]
        return _session_of(kinds[0]) if kinds else object
    kind = typing.get_origin(annotation) or annotation  # scoped_session[Session]
    return kind if isinstance(kind, type) else object


def _annotations_of(run: Any) -> dict[str, Any]:
    function = inspect.unwrap(getattr(run, "__func__", run))
    annotations = _annotations(function)
    if any(isinstance(value, str | typing.ForwardRef) for value in annotations.values()):
        annotations = _evaluated(function, annotations)
    return annotations


def _annotations(function: Any) -> dict[str, Any]:
    try:
        return getattr(function, "__annotations__", None) or {}
    except NameError:  # Python 3.14 evaluates them now, and one is imported for type checkers only
        library: Any = importlib.import_module("annotationlib")
        return dict(library.get_annotations(function, format=library.Format.FORWARDREF))


def _evaluated(function: Any, annotations: dict[str, Any]) -> dict[str, Any]:
    """Return the annotations of a module with `from __future__ import annotations`, each for itself: one that is only
    imported for type checkers must not hide the others.

    Raises:
        ConfigurationError: one of ours cannot be evaluated, and the parameter would never be filled.
    """
    names = getattr(function, "__globals__", {})
    found = {}
    for name, annotation in annotations.items():
        written = annotation.__forward_arg__ if isinstance(annotation, typing.ForwardRef) else annotation
        try:
            found[name] = eval(written, names) if isinstance(written, str) else written  # noqa: S307
        except Exception as error:
            if _is_ours(written):
                raise ConfigurationError(
                    f"The annotation {written!r} of the parameter {name!r} of {function.__qualname__} cannot be "
                    f"evaluated ({type(error).__name__}: {error}), so that no Session would be passed. Import its "
                    f"names at the top of {function.__module__}, not only for type checkers."
                ) from error
            found[name] = None
    return found


def _is_ours(annotation: str) -> bool:
    """Tell whether an annotation, as it is written, names CurrentSession, CurrentAsyncSession or UseDatabase."""
    try:
        nodes = [*ast.walk(ast.parse(annotation, mode="eval"))]
    except SyntaxError:
        return False
    named = {getattr(node, "id", None) or getattr(node, "attr", None) for node in nodes}
    return bool(named & {"CurrentAsyncSession", "CurrentSession", "UseDatabase"})
