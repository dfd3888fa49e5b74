"""The task class: `self.db` is the Session of this task request."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from celery import Task
from celery.result import AsyncResult
from kombu.exceptions import EncodeError
from sqlalchemy.orm import Session

from ..strategies.features.read_only import IN_TRANSACTION, MODES, ReadOnly
from ..strategies.scope import SCOPE, current_scope
from . import apps, databases, wrapping
from .attributes import refuse_misspelled
from .errors import ConfigurationError
from .exactly_once import choosing as once
from .injection import hide_from_callers, refuse_other_kind
from .no_unit import no_unit_here
from .sending import calls, enqueue, orders, plain
from .sending.arguments import are_plain, explain, refuse_sessions
from .sending.celerys_own import mark_methods, sent_by_celery
from .sending.late import has_late
from .sending.options import check_call
from .starting.attach import BOOTSTEP

if TYPE_CHECKING:
    AnyTask = Task[..., Any]
else:
    AnyTask = Task  # which cannot be subscripted before Celery 5.6

_HOOKS = ("before_start", "on_success", "on_failure", "on_retry", "after_return")


class BaseDatabaseTask(AnyTask):  # type: ignore[misc, valid-type]
    """What DatabaseTask and AsyncDatabaseTask have in common: all but the kind of their Session."""

    abstract = True

    is_async: ClassVar[bool] = False
    """It is an `async def` task, and runs on an event loop."""

    commit_on_success: ClassVar[bool | None] = None
    """Commit when the task returns; False rolls back instead. None: as `alchemy_commit_on_success` says (True)."""

    enqueue_on_commit: ClassVar[bool | None] = None
    """Let `delay` and `apply_async` of this task, called inside a unit of work, wait for its COMMIT; False sends at
    once. None: as `alchemy_enqueue_on_commit` says (False). A call may differ: `apply_async(enqueue_on_commit=...)`."""

    isolation_retries: ClassVar[int | None] = None
    """Run the body again, in a fresh transaction and at once, up to so many times while the server rolls it back
    because of another one: deadlock, serialization failure. For a body that does nothing but work in the database.
    None: as `alchemy_isolation_retries` says (0)."""

    exactly_once: ClassVar[bool | Literal["first", "last"] | None] = None
    """Record the task in the transaction of its work: delivered again, it does not run, and its recorded result is
    returned. True or "first": a copy that runs at the same time waits before it has done anything. "last": the copy
    that comes second is rolled back. None: as `alchemy_exactly_once` says (False)."""

    read_only: ClassVar[ReadOnly] = False
    """True: no transaction, each statement sees what is committed, the database refuses writes; one SELECT is one round
    trip. "transaction": one transaction with one snapshot, which may not write."""

    _sends_plainly: ClassVar[bool] = True
    """No class of the user's has a say in what `delay_on_commit` sends."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        _wrap(cls)

    @classmethod
    def on_bound(cls, app: Any) -> None:
        """Wrap what `task_annotations` put on the class since; let workers of `app` check that it has a database."""
        _wrap(cls)
        app.steps["worker"].add(BOOTSTEP)
        super().on_bound(app)

    @classmethod
    def refuse_function(cls, run: Any) -> None:
        """Refuse `run`, the task's function, where it is of the other kind.

        Raises:
            ConfigurationError: it is.
        """

    def delay_on_commit(self, *args: Any, **kwargs: Any) -> AsyncResult[Any]:
        """Send this task after the COMMIT of the current unit of work: `apply_async_on_commit` in the star form."""
        if self._sends_plainly:
            result = plain.send_plain(self, args, kwargs)
            if result is not None:
                return result
        return self.apply_async_on_commit(args, kwargs)

    @calls.passes_on
    def apply_async_on_commit(
        self,
        args: Any = None,
        kwargs: Any = None,
        *,
        session: Any = None,
        raises: bool = False,
        **options: Any,
    ) -> AsyncResult[Any]:
        """Send this task after the next real COMMIT, so that it finds what was written.

        Dropped when the transaction, or the savepoint it was called in, is rolled back. A unit of work that ends well
        without a transaction sends at its end. Outside any unit of work it waits for the Session of a `db.follow()`
        block, or else of a shared `scoped_session`; where there is none, `alchemy_on_commit_outside` decides. Under an
        AsyncSession `await session.commit()` sends, in a thread. Arguments are checked and serialised now. A broker
        that fails after the COMMIT is logged with the name and id of the task.

        Args:
            session: Wait for the COMMIT of this Session instead, which somebody else opened and will commit: a web
                application's Session, its `scoped_session` or AsyncSession.
            raises: Raise the broker's error to whoever commits, the transaction being committed all the same.
            options: Of `apply_async`. A countdown counts from the COMMIT; a producer is not used.

        Returns:
            The AsyncResult whose id the task will have.
        """
        if options or not are_plain(args, kwargs):
            check_call(self.name, args, kwargs, options)
            refuse_sessions(self.name, args, kwargs)
        if session is None and getattr(self.app, apps.ATTRIBUTE, None) is None:
            session = enqueue.session_outside(self.app, self)
        with orders.on_commit(session, raises=raises):
            return self.apply_async(args, kwargs, **options)

    @calls.passes_on
    def apply_async(self, args: Any = None, kwargs: Any = None, *more: Any, **options: Any) -> Any:
        """Send this task, as Celery does; an eager one waits for the COMMIT as a message would."""
        if not are_plain(args, kwargs) and has_late(args, kwargs):
            return calls.send(self.apply_async, self, args, kwargs, more, options)
        try:
            with orders.sending(self):
                return super().apply_async(args, kwargs, *more, **options)
        except EncodeError as error:
            explain(error, args, kwargs)
            raise

    def apply(self, args: Any = None, kwargs: Any = None, *more: Any, **options: Any) -> Any:
        """Run this task here and now, as Celery does. `apply_async` ends here too with `task_always_eager`."""
        if orders.sends(self):
            return enqueue.eagerly(self, super().apply, args, kwargs, options)
        return super().apply(args, kwargs, *more, **options)

    def retry(self, *args: Any, **kwargs: Any) -> Any:
        """Roll back, give the connection back, then retry: the next attempt may start before this method returns."""
        once.refuse_retry(self, kwargs.get("exc"))
        entry = self._own_entry()
        if entry is not None:
            for inner in entry.registry.above(entry):
                inner.roll_back()
            entry.unit.roll_back()
        with sent_by_celery():
            return super().retry(*args, **kwargs)

    def on_replace(self, sig: Any) -> Any:
        """Commit, then replace: the replacement may start before this method returns."""
        entry = self._own_entry()
        if entry is not None:
            for inner in entry.registry.above(entry):
                inner.succeed(final=False)
            ended = once.replaced_by(self, sig, super().on_replace)
            entry.unit.succeed(final=False)
            if ended is not None:
                raise ended
            once.record_replacement(self)
        with sent_by_celery():
            return super().on_replace(sig)

    def _own_entry(self) -> Any:
        """Return the entry of this request; None when it was called like a function, and publishes nothing."""
        db = apps.find(self.app)
        request = self.request_stack.top
        if db is None or request is None or request.called_directly:
            return None
        entry = db.units.entry_of(self)
        # After `run` has ended (autoretry), an entry still found may be that of an outer request of the same task.
        return entry if entry is not None and entry.request is request else None


def _wrap(cls: type[BaseDatabaseTask]) -> None:
    """Put `run`, an own `__call__` and the hooks into their units of work, wherever in the bases they stand."""
    run = inspect.getattr_static(cls, "run")
    if not wrapping.is_wrapped(run) and run is not inspect.getattr_static(Task, "run"):
        cls.refuse_function(run)
        refuse_other_kind(cls.name or cls.__name__, run, is_async=cls.is_async)
        cls.run = wrapping.wrap_run(run)
        if places := wrapping.injected_places(cls.run):
            hide_from_callers(cls, places)
    call = inspect.getattr_static(cls, "__call__")
    if not wrapping.is_wrapped(call) and call is not inspect.getattr_static(Task, "__call__"):
        cls.__call__ = wrapping.wrap_call(call)
    for name in _HOOKS:
        hook = inspect.getattr_static(cls, name)
        if not wrapping.is_wrapped(hook) and hook is not inspect.getattr_static(Task, name):
            setattr(cls, name, wrapping.wrap_hook(name, hook))
    calls.defer_overrides(cls)
    cls._sends_plainly = calls.sends_plainly(cls)
    mark_methods(cls)
    refuse_misspelled(cls)
    if not any(cls.read_only is mode or cls.read_only == mode == IN_TRANSACTION for mode in MODES):
        raise ConfigurationError(
            f"read_only={cls.read_only!r} of {cls.name or cls.__name__!r} must be False, True or 'transaction'."
        )
    retries = cls.isolation_retries
    if not isinstance(retries, int | None) or isinstance(retries, bool) or (retries is not None and retries < 0):
        raise ConfigurationError(
            f"isolation_retries={retries!r} of {cls.name or cls.__name__!r} must be a whole number, 0 or more."
        )
    once.refuse_wrong(cls)
    if not isinstance(cls.commit_on_success, bool | None):
        raise ConfigurationError(
            f"commit_on_success={cls.commit_on_success!r} of {cls.name or cls.__name__!r} must be True or False."
        )


class DatabaseTask(BaseDatabaseTask):
    """Task whose `self.db` is the Session of the request that is running, opened on first use::

        @app.task(base=DatabaseTask, bind=True)
        def create(self: DatabaseTask, name: str):
            self.db.add(User(name=name))

    A task that returns is committed, before its result is stored and the next task of a chain is sent; one that raises
    is rolled back; a retry is rolled back before it is sent.

    Works as `base=`, as `Celery(task_cls="celery_alchemy:DatabaseTask")`, for class-based tasks, and as a mixin.
    """

    abstract = True

    @property
    def db(self) -> Session:
        """The Session of the task request that runs in this thread or greenlet, opened on first use.

        Raises:
            NoUnitOfWork: this thread or greenlet runs no request, for example because the task started it.
            ConfigurationError: the app has no Alchemy.
        """
        scope = getattr(current_scope(), SCOPE, None)
        if scope is not None and scope.units:
            entry = scope.units[-1]
            if entry.holder is self:
                session: Session | None = entry.ready
                return session if session is not None else entry.session
        return self._session_of(apps.get(self.app))

    def session_for(self, database: str) -> Session:
        """Return the Session of this task request on another database of the app; `self.db` is of "default".

        It belongs to the same unit of work: it is committed, rolled back and released with `self.db`.

        Raises:
            NoUnitOfWork: as `db` does.
            ConfigurationError: the app has no such database.
        """
        return self._session_of(databases.database(apps.get(self.app), database))

    def _session_of(self, db: Any) -> Session:
        registry = db.units
        entry = registry.entry_of(self) or registry.current_entry()
        if entry is None:
            raise no_unit_here(f"self.db of {self.name}")
        session: Session = registry.unit_of(entry).session
        return session

    @classmethod
    def refuse_function(cls, run: Any) -> None:
        function = inspect.unwrap(getattr(run, "__func__", run))
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise ConfigurationError(
                f"The task {cls.name or cls.__name__!r} is an `async def` function, which a DatabaseTask does not "
                f"await. Make it an AsyncDatabaseTask (base=AsyncDatabaseTask), whose `self.db` is an AsyncSession; or "
                f"make it an ordinary function."
            )
