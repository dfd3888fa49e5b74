"""A run of the benchmark: its services, its contests one after the other, what is kept and what is said meanwhile."""

from __future__ import annotations

import os
import random
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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from ...workers.selection import automatic
from ..errors import LoadTestError
from ..overhead import round_trips
from ..services.brokers import broker
from ..services.databases import database_server
from ..services.rundir import run_directory
from ..tasks.patterns import OURS, PATTERNS, POOLS
from ..tasks.workloads import WORKLOADS
from .arguments import missing
from .batches import Schedule, run_batch
from .cells import Bench
from .contests import Contest, demo_contests, plan, remaining
from .demo import WORKLOAD, run_demo
from .generator import Generator
from .results import RUN_FILE, Batch, RunFacts, knee_of
from .store import Store, forget, machine, versions, writing
from .sweep import SweepOptions, run_sweep
from .user_task import UserTask, find_user_task

WIDTH = 110
"""Columns, where the output is no terminal that knows its own width."""


class Run:
    """One command: where it says what it does, and where it keeps what it has found."""

    given: dict[str, Any]
    options: dict[str, Any]
    part: str
    user_task: UserTask | None

    def __init__(self, part: str, user_task: UserTask | None, options: dict[str, Any], **given: Any) -> None:
        """Note what is asked for.

        Args:
            part: Of a results directory: `matrix`, `sweep` or `demo`.
            options: What results depend on.
            given: Every option of the command.
        """
        self.part, self.user_task, self.options, self.given = part, user_task, options, given
        self.console: Any = console_of_run()
        self.progress: Progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[stage]}"),
            console=self.console, transient=True, disable=not self.console.is_terminal,
        )  # fmt: skip

    @contextmanager
    def running(self, contests: Sequence[Contest]) -> Iterator[tuple[Bench, Store]]:
        """Start the services and the load generator; leave by a signal as by Ctrl-C, and say what is kept.

        Writes the report when the block ends well.
        """
        out, console, task = self.given["out"], self.console, self.user_task
        # Also where they are ignored, as by a shell in the background: a run that nothing stops leaves its servers.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _leave)
        try:
            with ExitStack() as stack:
                stack.enter_context(writing(out))
                if self.part == "demo" and (out / RUN_FILE).exists() and set(RunFacts.read(out).options) != {"demo"}:
                    raise LoadTestError(f"--out {out} holds other results than a demo's. Give another directory.")
                run, url, broker_url = stack.enter_context(run_directory()), *self._urls()
                server = stack.enter_context(database_server(run, url)) if url or not task else None
                queue = stack.enter_context(broker(run, broker_url))
                generator = stack.enter_context(Generator.running(run))
                services = [*([server.label] if server else []), queue.label]
                console.print(", ".join(services), highlight=False)
                if self.given["fresh"]:
                    forget(out)
                store = Store(out, self.part, self._facts(services, contests))
                with self.progress:
                    yield Bench(run, server, queue, generator, task), store
        except LoadTestError as error:
            console.print("[bold red]The benchmark cannot go on.[/]", end=" ")
            console.print(str(error), markup=False, highlight=False, soft_wrap=True)
            sys.exit(2)
        except SystemExit as leaving:
            if leaving.code == 128 + signal.SIGINT:
                console.print(
                    f"Stopped: the workers and servers of this run are gone. What was finished is in {out}; the same "
                    f"command goes on from there."
                )
            raise
        write_report(console, out)

    def _urls(self) -> tuple[str | None, str | None]:
        task = self.user_task
        if task is None:
            return self.given["database_url"], self.given["broker_url"]
        return task.database_url.render_as_string(hide_password=False) if task.database_url else None, task.broker_url

    def _facts(self, services: list[str], contests: Sequence[Contest]) -> RunFacts:
        names = dict.fromkeys(contest.workload for contest in contests)
        patterns = dict.fromkeys(arm.pattern for contest in contests for arm in contest.arms)
        asked, own = "The task that was asked for.", "The task's own way to get a Session."
        return RunFacts(
            command=_command(),
            begun=datetime.now(UTC).isoformat(timespec="seconds"),
            options=self.options,
            services=services,
            versions=versions(),
            machine=machine(),
            workloads={name: WORKLOADS[name].summary if name in WORKLOADS else asked for name in names},
            patterns={name: PATTERNS[name].summary if name in PATTERNS else own for name in patterns},
            objective=self.options.get("objective", ""),
        )


def matrix_run(ctx: click.Context, kinds: Sequence[str], schedule: Schedule, only: Sequence[str], **given: Any) -> bool:
    """Run the matrix, or what `only` names of it, and write the report; return whether an arm of our own is broken."""
    user_task = find_user_task(ctx, **given)
    contests = plan(kinds, user_task, automatic(), **given)
    if only and not any(fnmatchcase(contest.name, one) for contest in contests for one in only):
        names = ", ".join(contest.name for contest in contests)
        raise click.BadParameter(f"{' '.join(only)} names no contest. There are: {names}.", param_hint="--only")
    run = Run("matrix", user_task, {"contests": list(kinds), **asdict(schedule), **_recorded(given)}, **given)
    for name in (*POOLS, *PATTERNS):
        if name not in (*given["pools"], *given["baselines"]) and (why := missing(name)):
            run.console.print(f"Left out: {why}", highlight=False)
    with run.running(contests) as (bench, store):
        batches = remaining(store, contests, schedule.restarts, only)
        if store.resumed:
            total = len(contests) * schedule.restarts
            run.console.print(f"Going on in {given['out']}: {len(store.done)} of {total} batches are there.")
        bar = run.progress.add_task("", total=len(batches), stage="")
        for contest, number in batches:
            run.progress.update(bar, description=f"{contest.name} ({number}/{schedule.restarts})")
            batch, rows = run_batch(
                bench, contest, number, schedule, without=store.broken[contest.name], first_slice=store.next_slice,
                progress=lambda stage: run.progress.update(bar, stage=stage),
            )  # fmt: skip
            store.add_batch(batch, rows)
            run.progress.advance(bar)
            run.console.print(_line(batch, schedule.restarts), highlight=False)
        if "round-trips" in kinds and not user_task and not store.has_round_trips:
            assert bench.server is not None
            run.progress.update(bar, description="round trips")
            counted = round_trips.measure(
                bench.run, bench.server, bench.broker, [OURS, *given["baselines"]], given["workloads"],
                progress=lambda pattern: run.progress.update(bar, stage=pattern),
            )  # fmt: skip
            store.add_round_trips(counted)
    return any(OURS in name for names in store.broken.values() for name in names)


def demo_run(**given: Any) -> bool:
    """Let the recipe and ours do the same work under each worker pool; return whether an arm of our own is broken."""
    contests = demo_contests(given["pools"], given["concurrency"][0], WORKLOAD)
    run = Run("demo", None, _recorded(given), **{**given, "fresh": True})
    with run.running(contests) as (bench, store):
        bar = run.progress.add_task("demo", total=1, stage="")
        for batch, rows in run_demo(bench, contests, lambda stage: run.progress.update(bar, stage=stage)):
            store.add_batch(batch, rows)
    return any(OURS in name for names in store.broken.values() for name in names)


def sweep_run(ctx: click.Context, chosen: SweepOptions, **given: Any) -> bool:
    """Sweep every arm several times, in random order; return whether an arm of our own is broken."""
    user_task, broken = find_user_task(ctx, **given), False
    contests = [
        contest
        for number in given["concurrency"]
        for contest in plan(["patterns"], user_task, automatic(), **{**given, "concurrency": [number]})
    ]
    arms = list(dict.fromkeys((contest.workload, arm) for contest in contests for arm in contest.arms if not arm.copy))
    todo = [(workload, arm, number) for number in range(1, chosen.sweeps + 1) for workload, arm in arms]
    # What drifts over hours hits no arm more than the others; gone on with, the order of the rest is the same.
    random.Random("sweep").shuffle(todo)  # noqa: S311 - reproducible, not secret.
    options = {**asdict(chosen), "objective": str(chosen.objective), **_recorded(given)}
    run = Run("sweep", user_task, options, **given)
    with run.running(contests) as (bench, store):
        todo = [(work, arm, number) for work, arm, number in todo if (work, arm.name, number) not in store.swept]
        bar = run.progress.add_task("", total=len(todo), stage="")
        for workload, arm, number in todo:
            run.progress.update(bar, description=f"{workload}, {arm.name} ({number}/{chosen.sweeps})")
            steps, rows = run_sweep(
                bench, arm, workload, chosen, number, store.next_slice,
                lambda stage: run.progress.update(bar, stage=stage),
            )  # fmt: skip
            store.add_sweep(steps, rows)
            run.progress.advance(bar)
            kept, _ = knee_of(steps)
            wrong = [verdict for verdict in steps[-1].verdicts if not verdict.passed]
            broken = broken or (bool(wrong) and arm.pattern == OURS)
            found = (
                f"{chosen.objective} up to {kept.offered_per_s:g} tasks/s" if kept else f"{chosen.objective} at no rate"
            )
            verdict = f"[bold red]BROKEN[/]: {wrong[0].name}: no" if wrong else found
            run.console.print(f"{workload:12} {arm.name:45} {number}/{chosen.sweeps} {verdict}", highlight=False)
    return broken


def _leave(number: int, _frame: FrameType | None) -> None:
    """Unwind, so that every server and worker is stopped on the way out."""
    sys.exit(128 + number)


def _recorded(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options that results depend on, and that may be shown."""
    hidden = {"out", "fresh", "database_url", "broker_url"}
    return {name: value for name, value in given.items() if name not in hidden}


def _command() -> str:
    """Return the command as it was given, without what a URL would tell."""
    words, hidden = [], False
    for word in sys.argv[1:]:
        name, equals, _ = word.partition("=")
        secret = name in ("--database-url", "--broker-url")
        words.append("..." if hidden else f"{name}=..." if secret and equals else word)
        hidden = secret and not equals
    return shlex.join(["celery", *words])


def _line(batch: Batch, restarts: int) -> str:
    broken = [cell for cell in batch.cells if cell.broken]
    names = ", ".join(f"{cell.arm.name} ({cell.broken[0].name}: no)" for cell in broken)
    right = f"{len(batch.cells) - len(broken)} right"
    said = f"{right}, [red]broken: {names}[/]" if broken else f"[green]{right}[/]"
    return f"{batch.contest:32} {batch.number}/{restarts} {batch.seconds:5.0f} s  {said}"


def write_report(console: Console, directory: Path) -> None:
    """Print the summary of a results directory, and write its report."""
    from .. import reports

    for path in reports.write_report(console, directory):
        console.print(f"Written: {path}", highlight=False)


def console_of_run() -> Console:
    """Return where a run says what it does."""
    return Console(width=None if sys.stdout.isatty() or os.environ.get("COLUMNS") else WIDTH)
