"""One cell of the matrix: a worker pool, a worker, a load, a verdict."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import URL

from .brokers import Broker, queue_of
from .databases import DatabaseServer, create_tables
from .environment import WorkerEnvironment
from .errors import WorkerError
from .invariants import Check, ConnectionFacts, check_answers, check_connections, check_ledger
from .load import Client, Kind, LoadResult, drive, plan
from .replies import ReplyList
from .rundir import RunDirectory
from .sampler import Observer, Sampler
from .worker import Worker, running_worker

ACCOUNTS = 50
"""Few enough that transfers meet at the same rows, enough that the run is not one queue behind the slow ones."""
SEND_S = 10.0
ANSWER_S = 15.0
SETTLE_S = 1.0
STOP_SETTLE_S = 3.0


@dataclass(frozen=True, slots=True)
class CellOptions:
    """What to run in a cell."""

    pool: str
    concurrency: int
    tasks: int
    strategy: str | None
    """Session strategy to insist on; None leaves the choice to the worker."""


@dataclass(frozen=True, slots=True)
class CellResult:
    """What came of it."""

    options: CellOptions
    checks: list[Check]
    strategy: str = ""
    reason: str = ""
    start_s: float = 0.0
    load_s: float = 0.0
    sent: int = 0
    succeeded: int = 0
    expected_failures: int = 0
    unexpected_failures: int = 0
    per_second: float = 0.0
    """Successful transfers per second."""
    p50_ms: float = math.nan
    p95_ms: float = math.nan
    peak_connections: int = 0
    announced_connections: int | None = None
    log: str = ""
    """The worker's log, if anything is wrong."""

    @property
    def broken(self) -> list[Check]:
        """The invariants that did not hold."""
        return [check for check in self.checks if not check.passed]


@dataclass(frozen=True, slots=True)
class Bench:
    """The services that all cells of a run share."""

    run: RunDirectory
    server: DatabaseServer
    broker: Broker


def run_cell(bench: Bench, options: CellOptions, progress: Callable[[str, int], None]) -> CellResult:
    """Run one worker under load, stop it, and check what it left.

    Args:
        progress: Called with the stage, and the number of transfers ended so far.
    """
    with bench.server.fresh_database(bench.run, options.pool) as database:
        create_tables(database, ACCOUNTS)
        environment = WorkerEnvironment(
            database_url=database.render_as_string(hide_password=False),
            broker_url=bench.broker.url,
            reply_url=bench.broker.reply_url,
            queue=f"celery-alchemy-{bench.run.id}-{options.pool}",
        )
        with queue_of(bench.run, environment):
            try:
                return _run_worker(bench, options, environment, database, progress)
            except WorkerError as error:
                return CellResult(options, [Check("the worker started", False, str(error))])


def _run_worker(
    bench: Bench,
    options: CellOptions,
    environment: WorkerEnvironment,
    database: URL,
    progress: Callable[[str, int], None],
) -> CellResult:
    name = str(database.database)
    client, replies = Client(environment), ReplyList(environment.reply_url, environment.reply_key)
    observer = Observer(bench.server.url, name)
    progress("starting the worker", 0)
    try:
        with (
            Sampler(bench.server.url, [name]) as sampler,
            running_worker(
                bench.run, environment, pool=options.pool, concurrency=options.concurrency, strategy=options.strategy
            ) as worker,
        ):
            load = drive(
                client,
                replies,
                plan(options.tasks, ACCOUNTS),
                in_flight=2 * (1 if options.pool == "solo" else options.concurrency),
                send_s=SEND_S,
                answer_s=ANSWER_S,
                alive=lambda: worker.alive,
                progress=lambda ended: progress("transfers", ended),
            )
            quiet = observer.settle(name, idle_in_transaction=0, within_s=SETTLE_S)
            died = not worker.alive
            progress("stopping the worker", len(load.answered))
            worker.process.stop()
            left = observer.settle(name, total=0, within_s=STOP_SETTLE_S)
    finally:
        observer.close()
        replies.close()
        client.close()
    facts = ConnectionFacts(
        peak=sampler.peaks[name].total,
        announced=worker.ready.max_connections,
        idle_in_transaction=quiet.idle_in_transaction,
        left_after_stop=left.total,
        sampling_error=sampler.error,
    )
    checks = [
        *check_answers(load),
        *check_ledger(database, load),
        *check_connections(facts, load),
        _check_end(worker, died),
    ]
    return _summary(options, worker, load, facts, checks)


def _check_end(worker: Worker, died: bool) -> Check:
    process = worker.process
    clean = not died and process.ended_by is signal.SIGTERM and process.exit_code == 0
    how = (
        "by itself, before it was told to" if died else f"by {process.ended_by.name if process.ended_by else 'itself'}"
    )
    return Check("the worker stopped when it was told to", clean, f"it ended {how}, with code {process.exit_code}")


def _summary(
    options: CellOptions, worker: Worker, load: LoadResult, facts: ConnectionFacts, checks: list[Check]
) -> CellResult:
    latencies = load.latencies_ms
    ended = [answered for answered in load.answered.values() if answered.final]
    unexpected = sum(answered.failure is not None for answered in ended)
    return CellResult(
        options,
        checks,
        strategy=worker.ready.strategy,
        reason=worker.ready.reason,
        start_s=worker.start_s,
        load_s=load.seconds,
        sent=len(load.answered),
        succeeded=len(latencies),
        expected_failures=sum(
            answered.transfer.kind is Kind.REFUSED and answered.failure is None for answered in ended
        ),
        unexpected_failures=unexpected,
        per_second=len(latencies) / load.seconds if load.seconds else 0.0,
        p50_ms=percentile(latencies, 50),
        p95_ms=percentile(latencies, 95),
        peak_connections=facts.peak,
        announced_connections=facts.announced,
        log=worker.process.log_tail(lines=2000) if not all(check.passed for check in checks) else "",
    )


def percentile(values: list[float], percent: int) -> float:
    """Return the nearest-rank percentile; NaN of nothing."""
    if not values:
        return math.nan
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]
