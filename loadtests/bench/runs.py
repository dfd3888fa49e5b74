"""A run of the benchmark: its services, its contests one after the other, what is kept and what is said meanwhile."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from fnmatch import fnmatchcase
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
from .cells import Bench
from .contests import AUTO, Contest, concurrency_of, patterns_contest, pools_contest
from .generator import Generator
from .matrix import MatrixOptions, remaining, run_matrix
from .results import Arm, Batch, RunFacts, knee_of
from .store import Store, forget, machine, versions, writing
from .sweep import SweepOptions, run_sweep
from .user_task import UserTask, find_user_task

WIDTH = 110
"""Columns, where the output is no terminal that knows its own width."""
AS_IT_IS = "as-it-is"
"""The pattern of a user's task whose app has no Alchemy: whatever it does."""


def matrix_run(
    ctx: click.Context, kinds: Sequence[str], matrix: MatrixOptions, only: Sequence[str], **given: Any
) -> bool:
    """Run the matrix, or what `only` names of it, and write the report; return whether an arm of our own is broken."""
    console = console_of_run()
    user_task = find_user_task(ctx, **given) if given["task"] else None
    contests = plan(kinds, user_task, **given)
    if only and not any(fnmatchcase(contest.name, one) for contest in contests for one in only):
        names = ", ".join(contest.name for contest in contests)
        raise click.BadParameter(f"{' '.join(only)} names no contest. There are: {names}.", param_hint="--only")
    with _running(console, user_task, **given) as (bench_, services):
        recorded = {"contests": list(kinds), **asdict(matrix), **_recorded(given)}
        if given["fresh"]:
            forget(given["out"])
        store = Store(given["out"], "matrix", _facts(recorded, services, contests))
        batches = remaining(store, contests, matrix.restarts, only)
        if store.resumed:
            total = len(contests) * matrix.restarts
            console.print(f"Going on in {given['out']}: {len(store.done)} of {total} batches are there.")
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
    write_report(console, given["out"])
    return any(OURS in name for names in store.broken.values() for name in names)


def _round_trips(
    bench_: Bench, progress: Progress, bar: TaskID, baselines: list[str], workloads: list[str], **_: Any
) -> dict[str, dict[str, float]]:
    assert bench_.server is not None
    return round_trips.measure(
        bench_.run, bench_.server, bench_.broker, [OURS, *baselines], workloads,
        progress=lambda pattern: progress.update(bar, stage=pattern),
    )  # fmt: skip


def sweep_run(ctx: click.Context, chosen: SweepOptions, **given: Any) -> bool:
    console, broken = console_of_run(), False
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
                kept, _ = knee_of(steps)
                wrong = [verdict for verdict in steps[-1].verdicts if not verdict.passed]
                broken = broken or (bool(wrong) and arm.pattern == OURS)
                found = f"up to {kept.offered_per_s:g} tasks/s" if kept else "at no rate"
                verdict = f"[bold red]BROKEN[/]: {wrong[0].name}: no" if wrong else f"{chosen.objective} {found}"
                console.print(f"{workload:12} {arm.name:45} {verdict}", highlight=False)
    write_report(console, given["out"])
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
    arms = list(dict.fromkeys(arm(pool, number) for pool in pools for number in concurrency))
    if "pools" in kinds and (len(arms) > 1 or "patterns" not in kinds):
        contests += [pools_contest(workload, arms) for workload in names]
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
    return contests


@contextmanager
def _running(console: Console, user_task: UserTask | None, **given: Any) -> Iterator[tuple[Bench, list[str]]]:
    """Start the services and the load generator; leave by a signal as by Ctrl-C, and say what is kept."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        with ExitStack() as stack:
            stack.enter_context(writing(given["out"]))
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


def write_report(console: Console, directory: Path) -> None:
    """Print the summary of a results directory, and write its report."""
    from .. import reports

    for path in reports.write_report(console, directory):
        console.print(f"Written: {path}", highlight=False)


def console_of_run() -> Console:
    """Return where a run says what it does."""
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
