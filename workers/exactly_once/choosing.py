"""Which tasks have `exactly_once`, and what is refused with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from celery import Celery

from ...strategies.engines import elsewhere
from ...strategies.errors import ResultLost
from ...strategies.features.exactly_once import (
    ATTEMPT,
    FIRST,
    LAST,
    Attempt,
    CommittedEarly,
    ExactlyOnce,
    Mode,
    OnceSession,
)
from ...strategies.hooks import UnitHook
from ..apps import Served
from ..errors import ConfigurationError, GivenBack
from ..request import RequestRunner, request_of
from ..settings import Settings
from ..wrapping import is_database_task
from . import chords, encoding

__all__ = [
    "Mode",
    "OnceSession",
    "follow_in_main_process",
    "has_any",
    "hooks",
    "mode_of",
    "prepare_threads",
    "prepare_worker",
    "record_replacement",
    "refuse_retry",
    "refuse_wrong",
    "replaced_by",
    "runner",
]

REQUEST = "celery_alchemy.workers.exactly_once.requests:OnceRequest"
_CELERYS = "celery.worker.request:Request"


def mode_of(task: Any, settings: Settings) -> Mode | None:
    """Return when the row of `task` is written; None: it has none.

    What the setting says is not for tasks that only read: they have no effects.
    """
    wish = task.exactly_once
    if wish is None:
        wish = settings.exactly_once if not task.read_only else False
    if not wish:
        return None
    return LAST if wish == LAST else FIRST


def runner(db: Served, inner: RequestRunner, mode: Mode, retries: int, side: Any = None) -> RequestRunner:
    """Return what runs the requests of a task with `exactly_once`, each attempt by `inner`.

    Args:
        side: What has the strategy of such tasks, where that is not `db`: for coroutines.
    """
    from . import endings, sends
    from .pruning import Pruning
    from .rows import Rows
    from .runner import ExactlyOnceRunner

    sends.install(db)
    if db.settings.outbox:
        endings.connect()
    rows = Rows(db, side)
    return ExactlyOnceRunner(inner, rows, Pruning(rows, db.settings.completed_kept_s), mode, retries)


def hooks() -> tuple[UnitHook, ...]:
    """Return what follows the units of work of such a task."""
    return (ExactlyOnce(),)


def refuse_wrong(cls: Any) -> None:
    """Refuse what the task class `cls` says of it, where it can mean nothing; let Celery's main process know of it.

    Raises:
        ConfigurationError: names the task, the value and the remedy.
    """
    wish = cls.exactly_once
    if wish is None or wish is False:
        return
    name = cls.name or cls.__name__
    if wish is not True and wish not in (FIRST, LAST):
        raise ConfigurationError(f"exactly_once={wish!r} of {name!r} must be True, False, 'first' or 'last'.")
    if cls.read_only:
        raise ConfigurationError(
            f"{name!r} has exactly_once={wish!r} and read_only={cls.read_only!r}. A task that only reads has no "
            f"effects, and nothing to write its row with: leave one of them out."
        )
    follow_in_main_process(cls)


def follow_in_main_process(task: Any) -> None:
    """Let Celery's main process treat requests of `task`, or of all tasks of a class, as of one with `exactly_once`."""
    if task.Request == _CELERYS:
        task.Request = REQUEST


def has_any(app: Celery, settings: Settings) -> bool:
    """Tell whether a task of `app` has `exactly_once`."""
    return any(is_database_task(task) and mode_of(task, settings) is not None for task in app.tasks.values())


def needs_table(app: Celery, settings: Settings) -> str:
    """Say what needs the table of completed tasks; "" where nothing does."""
    from .backend import AlchemyBackend

    if has_any(app, settings):
        return "Tasks have exactly_once"
    return "Results are kept in the database (result_backend)" if isinstance(app.backend, AlchemyBackend) else ""


def prepare_worker(app: Celery, settings: Settings) -> None:
    """Let a worker that starts know which tasks of `app` have `exactly_once` because the setting says so.

    Raises:
        ConfigurationError: the result backend would count a member of a chord twice that is delivered twice; or each
            statement commits itself; or the results that are recorded could not be read.
    """
    if _is_autocommit(settings.engine_options):
        for is_so, what, row in (
            (has_any(app, settings), "Tasks have exactly_once", "the row that says that it is done"),
            (bool(settings.outbox), "alchemy_outbox is set", "the row that keeps a message"),
        ):
            if is_so:
                raise ConfigurationError(
                    f"{what}, and alchemy_engine_options say isolation_level='AUTOCOMMIT': the work of a task, and "
                    f"{row}, would be committed one by one. Leave isolation_level out. Tasks that only read have "
                    f"read_only=True."
                )
    chords.refuse_counting_twice(app, lambda: has_any(app, settings))
    if has_any(app, settings):
        encoding.refuse_unreadable(app)
    if settings.outbox and has_any(app, settings):
        from . import endings

        endings.connect()  # the main process ends requests too: a hard time limit, a revoked task
    if settings.exactly_once:
        for task in app.tasks.values():
            if is_database_task(task) and mode_of(task, settings) is not None:
                follow_in_main_process(task)


def _is_autocommit(engine_options: Mapping[str, Any]) -> bool:
    """Tell whether these arguments of create_engine say so. What the driver, an Engine of the user's or a task says
    itself is seen when a transaction begins."""
    for options in (engine_options, engine_options.get("execution_options") or {}):
        if str(options.get("isolation_level", "")).upper() == "AUTOCOMMIT":
            return True
    return False


def prepare_threads(app: Celery, settings: Settings) -> None:
    """Listen to SQLAlchemy, in a worker whose processes run tasks at the same time, before any of them does."""
    if has_any(app, settings):
        elsewhere.listen()
        hooks()


def refuse_retry(task: Any, error: object = None) -> None:
    """Refuse a retry of a request that has committed: it is recorded, and would not run again.

    Args:
        error: What `autoretry_for` wants to try it again for.
    Raises:
        CommittedEarly: it is one.
        GivenBack, ResultLost: `error` is one: the body has not run, and there is nothing to try again.
    """
    if isinstance(error, GivenBack | ResultLost):
        raise error
    attempt = attempt_of(task)
    if attempt is not None and attempt.committed:
        raise CommittedEarly(
            f"{attempt.label} has exactly_once, and retries after self.db.commit(): the COMMIT has recorded it, so "
            f"that it would not run again. Leave self.db.commit() out, which the end of the task does; or send what is "
            f"to be tried again as a task of its own."
        )


def replaced_by(task: Any, signature: Any, on_replace: Callable[[Any], Any]) -> BaseException | None:
    """`task` is about to commit, and to be replaced by `signature`: its row says so.

    Args:
        on_replace: Sends it, and ends the request.
    Returns:
        What ends the request after the COMMIT, where `signature` goes into the outbox; else None.
    """
    attempt = attempt_of(task)
    if attempt is None:
        return None
    from .following import store_replacement
    from .replacing import record_of

    attempt.record = record_of(signature)
    return store_replacement(task, attempt, signature, on_replace)


def record_replacement(task: Any) -> None:
    """`task` is about to be replaced: let its row say so, where it has committed before, and had nothing to commit
    now."""
    attempt = attempt_of(task)
    if attempt is not None and attempt.committed and attempt.record is not None and attempt.written != attempt.record:
        attempt.write(attempt, attempt.record)


def attempt_of(task: Any) -> Attempt | None:
    """Return the Attempt that `task` runs in; None where it has no `exactly_once`, or is called like a function."""
    request = request_of(task)
    found: Attempt | None = request.__dict__.get(ATTEMPT) if request is not None else None
    return found
