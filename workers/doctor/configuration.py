"""Settings that work, and will not in production."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from celery import Celery

from ...strategies import SessionStrategy
from ...strategies.drivers.url import shown
from ...strategies.engines.pool import max_connections
from ...strategies.engines.sizing import GREEN_CONNECTIONS
from ...strategies.worker_pool import WorkerPool
from .. import apps
from ..exactly_once.choosing import mode_of
from ..exactly_once.chords import CHORD_UNLOCK, polls_for_chords
from ..extension import Alchemy
from ..redelivery import redelivered_within_s
from ..sending.kept import again_within_s
from ..task import DatabaseTask
from .code import tasks_of
from .findings import Finding, error, note, warning

_REDIS_VISIBILITY_S = 3600


def look_at_settings(app: Celery, databases: dict[str, Alchemy], worker_pool: WorkerPool) -> Iterator[Finding]:
    """Yield what the settings of the app and of its databases are wrong about."""
    for name, db in databases.items():
        yield from _of_database(name, db.strategy, db.settings.engine_options, worker_pool)
    yield from _acknowledgement(app, worker_pool)


def _of_database(
    name: str, strategy: SessionStrategy, options: dict[str, Any], worker_pool: WorkerPool
) -> Iterator[Finding]:
    setting = strategy.engines.options.options_setting
    if str(options.get("isolation_level", "")).upper() == "AUTOCOMMIT":
        yield error(
            "autocommit",
            f"Every statement on the database {name!r} commits itself: a task that fails leaves half of its work.",
            f"Leave isolation_level out of {setting}; tasks that only read have read_only=True.",
            setting,
        )
    if options.get("pool_pre_ping"):
        yield note(
            "pre-ping",
            f"pool_pre_ping asks the server of {name!r} for each task. Connections that the server has closed are "
            f"noticed without it, by a look at the socket.",
            f"Leave it out of {setting} and save a round trip a task.",
            setting,
        )
    yield from _queues(name, strategy, options, worker_pool)
    given = strategy.engines.user_engine
    if _is_null_pool(options.get("poolclass")) or (given is not None and _is_null_pool(type(given.pool))):
        yield warning(
            "null-pool",
            f"NullPool connects to {name!r} anew for each task, which takes longer than most statements.",
            f"Leave poolclass out of {'its create_engine()' if given is not None else setting}: a connection pool is "
            f"safe across forks here.",
            setting,
        )
    if strategy.engines.url.get_backend_name() == "sqlite" and worker_pool.concurrency > 1:
        yield warning(
            "sqlite",
            f"{name!r} is a SQLite file: one task writes at a time, and the others wait.",
            "For production use PostgreSQL, MySQL or MariaDB.",
            setting,
        )


def _is_null_pool(kind: object) -> bool:
    return getattr(kind, "__name__", "") == "NullPool"


def _queues(
    name: str, strategy: SessionStrategy, options: dict[str, Any], worker_pool: WorkerPool
) -> Iterator[Finding]:
    """Yield a warning for each connection pool that has fewer connections than tasks need.

    Greenlets queue by design: those that wait for something else need no connection. `GREEN_CONNECTIONS` are enough.
    """
    tasks = worker_pool.tasks_per_process
    needed = min(tasks, GREEN_CONNECTIONS) if worker_pool.takes_turns else tasks
    setting = strategy.engines.options.options_setting
    given = strategy.engines.user_engine
    found: list[tuple[str, int | None, str]] = []
    if given is not None:
        found.append(("the Engine", max_connections(given.pool), "Make the Engine"))
    elif "poolclass" not in options and not worker_pool.takes_turns:
        size = strategy.size
        limit = None if size.max_overflow < 0 else size.pool_size + size.max_overflow
        found.append(("the connection pool", limit, ""))
    for engine in strategy.engines.others:
        found.append((f"the Engine of `binds` ({shown(engine.url)})", max_connections(engine.pool), "Make it"))
    for what, limit, remedy in found:
        if limit is not None and limit < needed:
            enough = f", and {needed} are enough for greenlets" if needed < tasks else ""
            yield warning(
                "tasks-queue",
                f"{tasks} tasks run at one time in a process, and {what} of {name!r} has {limit} connections{enough}: "
                f"the others wait for one, up to pool_timeout.",
                f"{remedy} with pool_size={needed}."
                if remedy
                else f"Leave pool_size and max_overflow out of {setting}; they follow the concurrency.",
                setting,
            )


def _acknowledgement(app: Celery, worker_pool: WorkerPool) -> Iterator[Finding]:
    tasks = {name: task for name, task in tasks_of(app).items() if isinstance(task, DatabaseTask)}
    late = {name: task for name, task in tasks.items() if task.acks_late}
    lost = [name for name, task in late.items() if not task.reject_on_worker_lost]
    if lost and worker_pool.forks:
        yield warning(
            "lost-when-killed",
            f"{_some(lost)}: acks_late is set, but a task whose process is killed (out of memory, hard time limit) is "
            f"acknowledged as failed, its transaction rolled back: nobody runs it again.",
            "Set task_reject_on_worker_lost = True, for tasks that may run twice.",
            "task_reject_on_worker_lost",
        )
    visible_s = app.conf.broker_transport_options.get("visibility_timeout", _REDIS_VISIBILITY_S)
    limits = {name: task.time_limit or app.conf.task_time_limit or 0 for name, task in late.items()}
    settings = apps.get(app).settings
    once = {name for name, task in tasks.items() if mode_of(task, settings) is not None}
    twice = [name for name, limit_s in limits.items() if limit_s > visible_s and name not in once]
    if twice and str(app.conf.broker_url or "").startswith(("redis", "valkey", "sqs")):
        yield warning(
            "runs-twice",
            f"{_some(twice)}: may run longer than the broker's visibility_timeout ({visible_s} s), and is then given "
            f"to another worker while it runs: both commit.",
            "Set exactly_once=True on them (docs/exactly-once.md), or raise visibility_timeout in "
            "broker_transport_options above the longest time limit.",
            "broker_transport_options",
        )
    if once:
        yield from _once(app, tasks, sorted(once), worker_pool)
        yield from _retention(apps.get(app))
        if settings.outbox:
            yield from _resending(app, settings.outbox_resend_s)
    never = [name for name, task in tasks.items() if not task.acks_late]
    if never:
        yield note(
            "acks-early",
            f"{_some(never)}: acknowledged before it runs, Celery's default. A worker that is killed loses it.",
            "Set task_acks_late and task_reject_on_worker_lost to True, for tasks that may run twice.",
            "task_acks_late",
        )


def _once(app: Celery, tasks: dict[str, Any], once: list[str], worker_pool: WorkerPool) -> Iterator[Finding]:
    def is_early(task: Any) -> bool:
        return not task.acks_late or (worker_pool.forks and not task.reject_on_worker_lost)

    early = [name for name in once if is_early(tasks[name])]
    if polls_for_chords(app.backend) and is_early(app.tasks[CHORD_UNLOCK]):
        yield warning(
            "chord-acks-early",
            f"With this result backend a message of Celery's own, {CHORD_UNLOCK}, waits for the members of each chord "
            f"and sends its body. It is acknowledged before it runs: if its worker is killed, the body never comes.",
            "Use result_backend = 'alchemy://' or Redis, or set task_acks_late and task_reject_on_worker_lost to True.",
            "task_acks_late",
        )
    if early:
        yield warning(
            "once-acks-early",
            f"{_some(early)}: exactly_once keeps the work from being done twice, but the broker does not deliver these "
            f"tasks again: one whose worker is killed is lost.",
            "Set task_acks_late and task_reject_on_worker_lost to True: with exactly_once a copy does no harm.",
            "task_acks_late",
        )


def _retention(db: apps.Served) -> Iterator[Finding]:
    within_s, kept_s = again_within_s(db), db.settings.completed_kept_s
    if within_s is not None and kept_s <= within_s * 2:
        yield warning(
            "forgotten-early",
            f"alchemy_completed_kept_s is {kept_s:.0f}, and a message may come again after {within_s:.0f} s (the "
            f"broker's visibility_timeout, alchemy_outbox_resend_s): a task whose row is gone runs again.",
            "Keep the rows for several times as long: leave alchemy_completed_kept_s out for seven days.",
            "alchemy_completed_kept_s",
        )


def _resending(app: Celery, resend_s: float | None) -> Iterator[Finding]:
    within_s = redelivered_within_s(app)
    if within_s is None or resend_s is None or resend_s > within_s:
        return
    remedy = "Leave alchemy_outbox_resend_s out: one and a half times the visibility timeout."
    if resend_s:
        yield warning(
            "resent-early",
            f"A message of the outbox is sent again after {resend_s:.0f} s, and the broker delivers it again after its "
            f"visibility_timeout of {within_s:.0f} s: copies pile up.",
            remedy,
            "alchemy_outbox_resend_s",
        )
    else:
        yield warning(
            "not-resent",
            "alchemy_outbox_resend_s is 0: a message that the broker loses on the way to its worker is not sent again.",
            remedy,
            "alchemy_outbox_resend_s",
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
