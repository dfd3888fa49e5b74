"""A run of the benchmark: its services, its contests one after the other, what is kept and what is said meanwhile."""

from __future__ import annotations

import os
import random
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from ...workers.selection import automatic
from ..client.lines import leave_on_signals
from ..errors import LoadTestError
from ..overhead import round_trips
from ..services.rundir import run_directory
from ..services.starting import broker, database_server
from ..tasks.patterns import OURS, PATTERNS, POOLS
from ..tasks.workloads import WORKLOADS
from .arguments import missing
from .batches import DEMO_WORKLOAD, Schedule, Tell, run_batch, run_demo
from .cells import Bench
from .contests import Contest, demo_contests, plan, remaining
from .generator import Generator
from .results import RUN_FILE, Batch, RunFacts, knee_of
from .store import Store, forget, machine, versions, writing
from .sweep import SweepOptions, run_sweep
from .user_task import UserTask, find_user_task

WIDTH = 110  # Columns, where the output is no terminal that knows its own width
Job = TypeVar("Job")


@dataclass(frozen=True, slots=True)
class Run:
    """A command that runs: what all of it shares, where it keeps what it finds, and where it says what it does."""

    bench: Bench
    store: Store
    console: Console
    progress: Progress

    def each(self, jobs: Mapping[str, Job]) -> Iterator[tuple[Job, Tell]]:
        """Yield one job after the other, and what shows the stage it is at, under a bar that shows their names."""
        bar = self.progress.add_task("", total=len(jobs), stage="")
        for name, job in jobs.items():
            self.progress.update(bar, description=name)
            yield job, lambda stage: self.progress.update(bar, stage=stage)
            self.progress.advance(bar)


@contextmanager
def _running(
    part: str, contests: Sequence[Contest], options: dict[str, Any], task: UserTask | None, *, out: Path, fresh: bool,
    database_url: str | None, broker_url: str | None, **given: Any,
) -> Iterator[Run]:  # fmt: skip
    """Start the services and the load generator; leave by a signal as by Ctrl-C, and say what is kept.

    Writes the report when the block ends well, and exits with 1 if an arm of our own is broken.

    Args:
        part: Of a results directory: `matrix`, `sweep` or `demo`.
        options: What results depend on, besides those in `given`.
    """
    console, options = console_of_run(), {**options, **given}
    progress = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[stage]}"),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    leave_on_signals()
    try:
        with ExitStack() as stack:
            stack.enter_context(writing(out))
            if part == "demo" and (out / RUN_FILE).exists() and set(RunFacts.read(out).options) != {"demo"}:
                raise LoadTestError(f"--out {out} holds other results than a demo's. Give another directory.")
            run = stack.enter_context(run_directory())
            if task:
                database_url = task.database_url and task.database_url.render_as_string(hide_password=False)
                broker_url = task.broker_url
            server = stack.enter_context(database_server(run, database_url)) if database_url or not task else None
            queue = stack.enter_context(broker(run, broker_url))
            generator = stack.enter_context(Generator.running(run))
            services = [*([server.label] if server else []), queue.label]
            console.print(", ".join(services), highlight=False)
            if fresh:
                forget(out)
            store = Store(out, part, _facts(services, contests, options))
            with progress:
                yield Run(Bench(run, server, queue, generator, task), store, console, progress)
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
    sys.exit(1 if store.ours_broken else 0)


def _facts(services: list[str], contests: Sequence[Contest], options: dict[str, Any]) -> RunFacts:
    names = dict.fromkeys(contest.workload for contest in contests)
    patterns = dict.fromkeys(arm.pattern for contest in contests for arm in contest.arms)
    asked, own = "The task that was asked for.", "The task's own way to get a Session."
    return RunFacts(
        command=_command(),
        begun=datetime.now(UTC).isoformat(timespec="seconds"),
        options=options,
        services=services,
        versions=versions(),
        machine=machine(),
        workloads={name: WORKLOADS[name].summary if name in WORKLOADS else asked for name in names},
        patterns={name: PATTERNS[name].summary if name in PATTERNS else own for name in patterns},
        objective=options.get("objective", ""),
    )


def matrix_run(ctx: click.Context, kinds: Sequence[str], schedule: Schedule, only: Sequence[str], **given: Any) -> None:
    """Run the matrix, or what `only` names of it."""
    user_task = find_user_task(ctx, **given)
    contests = plan(kinds, user_task, automatic(), **given)
    if only and not any(fnmatchcase(contest.name, one) for contest in contests for one in only):
        names = ", ".join(contest.name for contest in contests)
        raise click.BadParameter(f"{' '.join(only)} names no contest. There are: {names}.", param_hint="--only")
    for name in (*POOLS, *PATTERNS):
        if name not in (*given["pools"], *given["baselines"]) and (why := missing(name)):
            console_of_run().print(f"Left out: {why}", highlight=False)
    options = {"contests": list(kinds), **asdict(schedule)}
    with _running("matrix", contests, options, user_task, **given) as run:
        bench, store = run.bench, run.store
        if store.resumed:
            total = len(contests) * schedule.restarts
            run.console.print(f"Going on in {given['out']}: {len(store.done)} of {total} batches are there.")
        todo = remaining(store, contests, schedule.restarts, only)
        jobs = {f"{one.name} ({number}/{schedule.restarts})": (one, number) for one, number in todo}
        for (contest, number), tell in run.each(jobs):
            without = store.broken[contest.name]
            batch, rows = run_batch(bench, contest, number, schedule, without, store.next_slice, tell)
            store.add_batch(batch, rows)
            run.console.print(_line(batch, schedule.restarts), highlight=False)
        if "round-trips" in kinds and bench.server and not user_task and not store.facts.round_trips:
            for patterns, tell in run.each({"round trips": [OURS, *given["baselines"]]}):
                services = bench.run, bench.server, bench.broker
                store.add_round_trips(round_trips.measure(*services, patterns, given["workloads"], progress=tell))


def demo_run(**given: Any) -> None:
    """Let the recipe and ours do the same work under each worker pool."""
    contests = demo_contests(given["pools"], given["concurrency"][0], DEMO_WORKLOAD)
    with _running("demo", contests, {}, None, fresh=True, **given) as run:
        for _, tell in run.each({"demo": None}):
            for batch, rows in run_demo(run.bench, contests, tell):
                run.store.add_batch(batch, rows)


def sweep_run(ctx: click.Context, chosen: SweepOptions, **given: Any) -> None:
    """Sweep every arm several times, in random order."""
    user_task = find_user_task(ctx, **given)
    contests = [
        contest
        for number in given["concurrency"]
        for contest in plan(["patterns"], user_task, automatic(), **{**given, "concurrency": [number]})
    ]
    arms = list(dict.fromkeys((contest.workload, arm) for contest in contests for arm in contest.arms if not arm.copy))
    todo = [(workload, arm, number) for number in range(1, chosen.sweeps + 1) for workload, arm in arms]
    # What drifts over hours hits no arm more than the others; gone on with, the order of the rest is the same.
    random.Random("sweep").shuffle(todo)  # noqa: S311 - reproducible, not secret.
    options = {**asdict(chosen), "objective": str(chosen.objective)}
    with _running("sweep", contests, options, user_task, **given) as run:
        store = run.store
        jobs = {
            f"{workload}, {arm.name} ({number}/{chosen.sweeps})": (workload, arm, number)
            for workload, arm, number in todo if (workload, arm.name, number) not in store.swept
        }  # fmt: skip
        for (workload, arm, number), tell in run.each(jobs):
            steps, rows = run_sweep(run.bench, arm, workload, chosen, number, store.next_slice, tell)
            store.add_sweep(steps, rows)
            kept, _ = knee_of(steps)
            wrong = [verdict for verdict in steps[-1].verdicts if not verdict.passed]
            found = f"{chosen.objective} {f'up to {kept.offered_per_s:g} tasks/s' if kept else 'at no rate'}"
            verdict = f"[bold red]BROKEN[/]: {wrong[0].name}: no" if wrong else found
            run.console.print(f"{workload:12} {arm.name:45} {number}/{chosen.sweeps} {verdict}", highlight=False)


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
    broken = [f"{cell.arm.name} ({cell.broken[0].name}: no)" for cell in batch.cells if cell.broken]
    right = f"[green]{len(batch.cells) - len(broken)} right[/]"
    said = f"{right}, [red]broken: {', '.join(broken)}[/]" if broken else right
    return f"{batch.contest:32} {batch.number}/{restarts} {batch.seconds:5.0f} s  {said}"


def write_report(console: Console, directory: Path) -> None:
    """Print the summary of a results directory, and write its report."""
    from .. import reports

    for path in reports.write_report(console, directory):
        console.print(f"Written: {path}", highlight=False)


def console_of_run() -> Console:
    """Return where a run says what it does."""
    return Console(width=None if sys.stdout.isatty() or os.environ.get("COLUMNS") else WIDTH)
