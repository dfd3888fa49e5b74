"""`celery alchemy bench`: which worker pool, strategy, concurrency and connection-pool size, and what they cost."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from ...workers.selection import automatic
from .. import round_trips
from ..errors import LoadTestError
from ..patterns import OURS, PATTERNS
from ..rundir import run_directory
from ..services import broker, database_server
from ..workloads import WORKLOADS
from .arguments import (
    BASELINE_NAMES,
    CONTEST_NAMES,
    POOL_NAMES,
    WORKLOAD_NAMES,
    Concurrencies,
    Json,
    ObjectiveType,
    Rates,
    Seconds,
    StrategyNames,
)
from .cells import Bench
from .contests import AUTO, Contest, concurrency_of, patterns_contest, pools_contest
from .generator import Generator
from .matrix import MatrixOptions, remaining, run_matrix
from .objective import Objective
from .results import Arm, Batch, RunFacts
from .store import Store, forget, machine, versions
from .sweep import SweepOptions, run_sweep
from .user_task import UserTask, find_user_task

WIDTH = 110
"""Columns, where the output is no terminal that knows its own width."""
AS_IT_IS = "as-it-is"
"""The pattern of a user's task whose app has no Alchemy: whatever it does."""
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

# What every command that starts workers takes.
POOLS = click.option("--pools", default="all", type=POOL_NAMES, help="Worker pools, separated by commas.")
STRATEGIES = click.option(
    "--strategies", default="all", type=StrategyNames(), help="Session strategies; auto is always there."
)
BASELINES = click.option(
    "--baselines", default="all", type=BASELINE_NAMES, help="Hand-written patterns to compare with, all or none."
)
WORKLOADS_OPTION = click.option("--workloads", default="all", type=WORKLOAD_NAMES, help="What the tasks do.")
CONCURRENCY = click.option(
    "--concurrency", default="4", type=Concurrencies(), help="Pool processes, threads or greenlets; solo has 1."
)
TASK = click.option("--task", help="Measure this task of the app given with `celery -A` instead of our workloads.")
ARGS = click.option("--args", default="[]", type=Json(list, "a JSON list, such as '[1]'"), help="Its arguments.")
KWARGS = click.option("--kwargs", default="{}", type=Json(dict, "a JSON object"), help="Its keyword arguments.")
DATABASE_URL = click.option(
    "--database-url", envvar="DATABASE_URL", help="Server to create databases on; an embedded PostgreSQL by default."
)
BROKER_URL = click.option("--broker-url", envvar="BROKER_URL", help="Broker; an embedded Valkey by default.")
OUT = click.option(
    "--out", default="report", type=click.Path(file_okay=False, path_type=Path), help="Where the results go."
)
FRESH = click.option("--fresh", is_flag=True, help="Remove the results in --out first, instead of going on with them.")
CHECKED = click.option(
    "--tasks", "checked_tasks", default=50, type=click.IntRange(5, 100_000), help="Checked tasks per pool slot."
)
USERS = click.option(
    "--users", "users_per_slot", default=2, type=click.IntRange(1, 100), help="Tasks in flight per pool slot."
)


def options(*decorators: Decorator) -> Decorator:
    """Return one decorator for several options, in the order the help shows them."""

    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


COMMON = options(
    POOLS, STRATEGIES, BASELINES, WORKLOADS_OPTION, CONCURRENCY, CHECKED, USERS, TASK, ARGS, KWARGS, DATABASE_URL,
    BROKER_URL, OUT, FRESH,
)  # fmt: skip


@click.group(
    invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "show_default": True}
)
@COMMON
@click.option("--contests", default="all", type=CONTEST_NAMES, help="What to compare: see below.")
@click.option("--rounds", default=30, type=click.IntRange(1, 1000), help="Slices for each arm, over all restarts.")
@click.option("--slice", "slice_s", default="1s", type=Seconds(0.1, 60), help="Length of a slice.")
@click.option("--restarts", default=3, type=click.IntRange(1, 20), help="How often the workers start anew.")
@click.pass_context
def bench(ctx: click.Context, /, **given: Any) -> None:
    """Compare worker pools and session patterns, in turns, on real workers, and write a report.

    Speed counts only where results are right: each worker is checked first. A run that was interrupted goes on where
    it stopped when the same command is given again.

    Contests: `patterns` compares our strategies and the hand-written patterns under each worker pool; `pools` the
    worker pools and concurrencies, each with the strategy it gets by itself; `round-trips` counts how often a task
    waits for the database's answer.
    """
    if ctx.invoked_subcommand is None:
        _bench(ctx, **given)
        return
    source = click.core.ParameterSource.COMMANDLINE
    misplaced = [name for name in given if ctx.get_parameter_source(name) is source]
    if misplaced:
        raise click.UsageError(f"Write the options after {ctx.invoked_subcommand!r}: they belong to it.", ctx)


def _bench(ctx: click.Context, contests: list[str], rounds: int, slice_s: float, restarts: int, **given: Any) -> None:
    matrix = MatrixOptions(
        rounds, restarts, slice_s, min(0.1, slice_s / 5), given["checked_tasks"], given["users_per_slot"]
    )
    if rounds < restarts:
        raise click.BadParameter("fewer rounds than restarts.", param_hint="--rounds")
    failed = _matrix(ctx, contests, matrix, **given)
    sys.exit(1 if failed else 0)


@bench.command()
@COMMON
@click.pass_context
def check(ctx: click.Context, /, **given: Any) -> None:
    """Check correctness only, for CI: a load for each worker, every invariant, no timing."""
    matrix = MatrixOptions(0, 1, 1.0, 0.1, given["checked_tasks"], given["users_per_slot"])
    sys.exit(1 if _matrix(ctx, ["patterns"], matrix, **given) else 0)


@bench.command()
@COMMON
@click.option("--objective", default="p95=100ms", type=ObjectiveType(), help="The latency to keep.")
@click.option("--rates", default="auto", type=Rates(), help="Tasks per second to offer, or auto.")
@click.option("--step", "step_s", default="4s", type=Seconds(0.5, 600), help="Length of a step.")
@click.pass_context
def sweep(ctx: click.Context, /, objective: Objective, rates: tuple[float, ...], step_s: float, **given: Any) -> None:
    """Offer more and more, whatever the worker does, until the latency objective breaks.

    One sweep for each worker pool, concurrency and workload, with the strategy `auto` unless --strategies names
    others; hand-written patterns only if --baselines names them.
    """
    source = click.core.ParameterSource.DEFAULT
    if ctx.get_parameter_source("strategies") is source:
        given["strategies"] = [AUTO]
    if ctx.get_parameter_source("baselines") is source:
        given["baselines"] = []
    chosen = SweepOptions(objective, step_s, rates, given["checked_tasks"], given["users_per_slot"])
    sys.exit(1 if _sweep(ctx, chosen, **given) else 0)


@bench.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
def report(directory: Path) -> None:
    """Write the report of a results directory again."""
    _report(_console(), directory)


@bench.command()
@click.argument("a", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("b", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--fail-if", "conditions", multiple=True, help="Such as goodput:-10% or p95:+20%; may be repeated.")
def compare(a: Path, b: Path, conditions: tuple[str, ...]) -> None:
    """Compare result directory B with A: ratios with intervals, and what broke or healed."""
    from ..reports import compare as comparing

    try:
        parsed = [comparing.parse_condition(text) for text in conditions]
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--fail-if") from None
    found = comparing.compare(a, b, parsed)
    comparing.print_comparison(_console(), found)
    sys.exit(1 if found.failed else 0)


def _matrix(ctx: click.Context, kinds: Sequence[str], matrix: MatrixOptions, **given: Any) -> bool:
    """Run the matrix and write the report; return whether one of our own arms is broken."""
    console = _console()
    user_task = find_user_task(ctx, **given) if given["task"] else None
    contests = plan(kinds, user_task, **given)
    with _running(console, user_task, **given) as (bench_, services):
        recorded = {"contests": list(kinds), **asdict(matrix), **_recorded(given)}
        if given["fresh"]:
            forget(given["out"])
        store = Store(given["out"], "matrix", _facts(recorded, services, contests))
        batches = remaining(store, contests, matrix.restarts)
        if store.resumed:
            total = len(contests) * matrix.restarts
            console.print(f"Going on in {given['out']}: {total - len(batches)} of {total} batches are there.")
        with _progress(console) as progress:
            bar = progress.add_task("", total=len(batches), stage="")

            def show(contest: Contest, number: int, stage: str) -> None:
                progress.update(bar, description=f"{contest.name} ({number}/{matrix.restarts})", stage=stage)

            for batch in run_matrix(bench_, store, batches, matrix, show):
                progress.advance(bar)
                console.print(_line(batch, matrix.restarts), highlight=False)
            if "round-trips" in kinds and not user_task and not store.has_round_trips:
                progress.update(bar, description="round trips")
                store.add_round_trips(_round_trips(bench_, progress, bar, **given))
    _report(console, given["out"])
    return any(OURS in name for names in store.broken.values() for name in names)


def _round_trips(
    bench_: Bench, progress: Progress, bar: TaskID, baselines: list[str], workloads: list[str], **_: Any
) -> dict[str, dict[str, float]]:
    assert bench_.server is not None
    return round_trips.measure(
        bench_.run, bench_.server, bench_.broker, [OURS, *baselines], workloads,
        progress=lambda pattern: progress.update(bar, stage=pattern),
    )  # fmt: skip


def _sweep(ctx: click.Context, chosen: SweepOptions, **given: Any) -> bool:
    console, broken = _console(), False
    user_task = find_user_task(ctx, **given) if given["task"] else None
    contests = [
        contest
        for number in given["concurrency"]
        for contest in plan(["patterns"], user_task, **{**given, "concurrency": [number]})
    ]
    arms = list(dict.fromkeys((contest.workload, arm) for contest in contests for arm in contest.arms if not arm.copy))
    with _running(console, user_task, **given) as (bench_, services):
        recorded = {**asdict(chosen), "objective": str(chosen.objective), **_recorded(given)}
        facts = _facts(recorded, services, contests, objective=str(chosen.objective))
        if given["fresh"]:
            forget(given["out"])
        store = Store(given["out"], "sweep", facts)
        todo = [(workload, arm) for workload, arm in arms if (workload, arm.name) not in store.swept]
        with _progress(console) as progress:
            bar = progress.add_task("", total=len(todo), stage="")
            for workload, arm in todo:
                progress.update(bar, description=f"{workload}, {arm.name}")
                steps, rows = run_sweep(
                    bench_, arm, workload, chosen, store.next_slice, lambda stage: progress.update(bar, stage=stage)
                )
                store.add_sweep(steps, rows)
                progress.advance(bar)
                best = max((step.offered_per_s for step in steps if step.met), default=None)
                wrong = [verdict for verdict in steps[-1].verdicts if not verdict.passed]
                broken = broken or (bool(wrong) and arm.pattern == OURS)
                found = "never" if best is None else f"up to {best:g} tasks/s"
                verdict = f"[bold red]BROKEN[/]: {wrong[0].name}: no" if wrong else f"{chosen.objective} {found}"
                console.print(f"{workload:12} {arm.name:45} {verdict}", highlight=False)
    _report(console, given["out"])
    return broken


def plan(
    kinds: Sequence[str],
    user_task: UserTask | None,
    *,
    pools: list[str],
    strategies: list[str],
    baselines: list[str],
    workloads: list[str],
    concurrency: list[int],
    **_: Any,
) -> list[Contest]:
    """Return the contests of a run."""
    names = [user_task.task] if user_task else workloads
    pattern, strategy = (AS_IT_IS, "") if user_task and not user_task.alchemy else (OURS, AUTO)

    def arm(pool: str, concurrency: int) -> Arm:
        return Arm(pool, concurrency_of(pool, concurrency), pattern, strategy)

    contests = []
    if "patterns" in kinds:
        contests += [
            patterns_contest(
                workload,
                arm(pool, concurrency[0]),
                strategies if strategy else [],
                [] if user_task else [name for name in baselines if pool in PATTERNS[name].pools],
                automatic(),
            )
            for pool in pools
            for workload in names
        ]
    arms = list(dict.fromkeys(arm(pool, number) for pool in pools for number in concurrency))
    if "pools" in kinds and (len(arms) > 1 or "patterns" not in kinds):
        contests += [pools_contest(workload, arms) for workload in names]
    return contests


@contextmanager
def _running(console: Console, user_task: UserTask | None, **given: Any) -> Iterator[tuple[Bench, list[str]]]:
    """Start the services and the load generator; leave by a signal as by Ctrl-C, and say what is kept."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        with ExitStack() as stack:
            run = stack.enter_context(run_directory())
            url = given["database_url"]
            if user_task:
                url = user_task.database_url.render_as_string(hide_password=False) if user_task.database_url else None
            server = stack.enter_context(database_server(run, url)) if url or not user_task else None
            queue = stack.enter_context(broker(run, user_task.broker_url if user_task else given["broker_url"]))
            generator = stack.enter_context(Generator.running(run))
            services = [*([server.label] if server else []), queue.label]
            console.print(", ".join(services), highlight=False)
            yield Bench(run, server, queue, generator, user_task), services
    except LoadTestError as error:
        console.print("[bold red]The benchmark cannot go on.[/]", end=" ")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print(
            f"Stopped: the workers and servers of this run are gone. What was finished is in {given['out']}; the same "
            f"command goes on from there."
        )
        sys.exit(128 + signal.SIGINT)


def _leave(number: int, _frame: FrameType | None) -> None:
    """Unwind as Ctrl-C does, so that every server and worker is stopped on the way out."""
    sys.exit(128 + number)


def _recorded(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options that results depend on, and that may be shown."""
    hidden = {"out", "fresh", "database_url", "broker_url"}
    return {name: value for name, value in given.items() if name not in hidden}


def _facts(recorded: dict[str, Any], services: list[str], contests: Sequence[Contest], objective: str = "") -> RunFacts:
    arms: list[Arm] = [arm for contest in contests for arm in contest.arms]
    return RunFacts(
        command=_command(),
        begun=datetime.now(UTC).isoformat(timespec="seconds"),
        options=recorded,
        services=services,
        versions=versions(),
        machine=machine(),
        workloads={
            name: WORKLOADS[name].summary if name in WORKLOADS else "The task that was asked for."
            for name in dict.fromkeys(contest.workload for contest in contests)
        },
        patterns={
            name: PATTERNS[name].summary if name in PATTERNS else "The task's own way to get a Session."
            for name in dict.fromkeys(arm.pattern for arm in arms)
        },
        objective=objective,
    )


def _command() -> str:
    """Return the command as it was given, without what a URL would tell."""
    words, hidden = [], False
    for word in sys.argv[1:]:
        secret = hidden or word.startswith(("--database-url=", "--broker-url="))
        words.append((word.partition("=")[0] + "=..." if not hidden else "...") if secret else word)
        hidden = word in ("--database-url", "--broker-url")
    return shlex.join(["celery", *words])


def _line(batch: Batch, restarts: int) -> str:
    broken = [cell for cell in batch.cells if cell.broken]
    head = f"{batch.contest:32} {batch.number}/{restarts} {batch.seconds:5.0f} s  "
    if not broken:
        return head + f"[green]{len(batch.cells)} right[/]"
    names = ", ".join(f"{cell.arm.name} ({cell.broken[0].name}: no)" for cell in broken)
    return head + f"{len(batch.cells) - len(broken)} right, [red]broken: {names}[/]"


def _report(console: Console, directory: Path) -> None:
    from ..reports import write_report

    for path in write_report(console, directory):
        console.print(f"Written: {path}", highlight=False)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() or os.environ.get("COLUMNS") else WIDTH)


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[stage]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
