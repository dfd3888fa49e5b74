"""`celery alchemy bench`: which worker pool, strategy, concurrency and connection-pool size, and what they cost."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial, reduce
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ...workers.selection import automatic
from ..overhead import round_trips
from ..tasks.patterns import OURS, PATTERNS
from . import arguments
from .arguments import AUTO, OneOf, json_of, missing, numbers, option, seconds
from .batches import DEMO_WORKLOAD, Schedule, SweepOptions, run_batch, run_demo, run_sweep
from .contests import demo_contests, find_user_task, plan, remaining
from .results import Objective, knee_of
from .runs import console_of_run, running, write_report

CONTEST = OneOf("kind of contest", ("patterns", "pools", "round-trips"))


def _whole(name: str, default: int, low: int, high: int, text: str) -> Any:
    return click.option(*name.split(), default=default, type=click.IntRange(low, high), help=text)


def _rates(value: str) -> tuple[float, ...]:
    message = "write tasks per second, such as 10,20,40, or auto."
    return () if value == "auto" else tuple(sorted(numbers(0.001, 100_000, float, message, value)))


# What every command that starts workers takes. One line each, to be read as a table.
# fmt: off
CONCURRENCIES = partial(numbers, 1, 1000, int, "write one or more whole numbers from 1 to 1000, such as 4 or 4,16.")
POOLS = option("--pools", "all", arguments.POOL.several, "Worker pools, separated by commas.")
CONCURRENCY = option("--concurrency", "4", CONCURRENCIES, "Pool processes, threads, greenlets; solo has 1.", "numbers")
SERVICES = (
    arguments.DATABASE_URL, arguments.BROKER_URL,
    click.option("--out", default="report", type=click.Path(file_okay=False, path_type=Path), help="Where results go."),
)
CHOSEN = (
    POOLS,
    option("--strategies", "all", arguments.STRATEGY.several, "Session strategies; auto is always there."),
    option("--baselines", "all", partial(arguments.BASELINE.several, none=True),
            "Patterns to compare with, all or none."),
    option("--workloads", "all", arguments.WORKLOAD.several, "What the tasks do."),
    CONCURRENCY,
    _whole("--tasks checked_tasks", 50, 5, 100_000, "Checked tasks per pool slot."),
    click.option("--task", help="Measure this task of the app given with `celery -A` instead of our workloads."),
    option("--args", "[]", partial(json_of, list), "Its arguments: a JSON list.", "json"),
    option("--kwargs", "{}", partial(json_of, dict), "Its keyword arguments: a JSON object.", "json"),
)
FRESH = click.option("--fresh", is_flag=True, help="Remove the results in --out first, instead of going on with them.")
DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)
# fmt: on


def options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return one decorator for several options, in the order the help shows them."""
    return lambda function: reduce(lambda made, decorator: decorator(made), reversed(decorators), function)


COMMON = options(*CHOSEN, *SERVICES, FRESH)


@click.group(
    invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "show_default": True}
)
@COMMON
@option("--contests", "all", CONTEST.several, "What to compare: see below.")
@_whole("--rounds", 40, 1, 1000, "Slices for each arm, over all restarts.")
@option("--slice slice_s", "500ms", partial(seconds, 0.1, 60), "Of what length.", "duration")
@_whole("--restarts", 10, 1, 50, "How often the workers start anew.")
@click.pass_context
def bench(ctx: click.Context, /, **given: Any) -> None:
    """Compare worker pools and session patterns, in turns, on real workers, and write a report.

    Speed counts only where results are right: each worker is checked first. A run that was interrupted goes on where
    it stopped when the same command is given again.

    Contests: `patterns` compares our strategies and the other patterns under each worker pool; `pools` the
    worker pools and concurrencies, each with the strategy it gets by itself; `round-trips` counts how often a task
    waits for the database's answer.
    """
    given_here = [name for name in given if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if ctx.invoked_subcommand is None:
        rounds, restarts, slice_s = (given.pop(name) for name in ("rounds", "restarts", "slice_s"))
        if rounds < restarts:
            raise click.BadParameter("fewer rounds than restarts.", param_hint="--rounds")
        schedule = Schedule(rounds, restarts, slice_s, min(0.1, slice_s / 5), given["checked_tasks"])
        _matrix(ctx, given.pop("contests"), schedule, **given)
    elif given_here:
        raise click.UsageError(f"Write the options after {ctx.invoked_subcommand!r}: they belong to it.", ctx)


def _matrix(ctx: click.Context, kinds: Sequence[str], schedule: Schedule, **given: Any) -> None:
    user_task = find_user_task(ctx, **given)
    contests = plan(kinds, user_task, automatic(), **given)
    for name in (*arguments.POOL.known, *PATTERNS):
        if name not in (*given["pools"], *given["baselines"]) and (why := missing(name)):
            console_of_run().print(f"Left out: {why}", highlight=False)
    options = {"contests": list(kinds), **asdict(schedule)}
    with running("matrix", contests, options, user_task, **given) as run:
        bench, store = run.bench, run.store
        if store.resumed:
            there = f"{len(store.done)} of {len(contests) * schedule.restarts} batches are there"
            run.console.print(f"Going on in {given['out']}: {there}.")
        for contest, number in remaining(store, contests, schedule.restarts):
            without = store.broken[contest.name]
            batch, rows = run_batch(bench, contest, number, schedule, without, store.next_slice, run.tell(contest.name))
            store.add_batch(batch, rows)
            broken = [f"{cell.arm.name} ({cell.broken[0].name}: no)" for cell in batch.cells if cell.broken]
            said = f"[green]{len(batch.cells) - len(broken)} right[/]"
            said += f", [red]broken: {', '.join(broken)}[/]" if broken else ""
            turn = f"{number}/{schedule.restarts} {batch.seconds:5.0f} s"
            run.console.print(f"{contest.name:32} {turn}  {said}", highlight=False)
        if "round-trips" in kinds and bench.server and not user_task and not store.facts.round_trips:
            patterns = [OURS, *given["baselines"]]
            told = run.tell("round trips")
            store.add_round_trips(round_trips.measure(bench, patterns, given["workloads"], progress=told))


@bench.command()
@COMMON
@click.pass_context
def check(ctx: click.Context, /, **given: Any) -> None:
    """Check correctness only, for CI: a load for each worker, every invariant, no timing."""
    _matrix(ctx, ["patterns"], Schedule(0, 1, 1.0, 0.1, given["checked_tasks"]), **given)


@bench.command()
@options(POOLS, CONCURRENCY, *SERVICES)
@_whole("--restarts", 1, 1, 50, "How often the workers start anew.")
def demo(restarts: int, **given: Any) -> None:
    """Let the hand-written recipe and celery-alchemy do the same work, and count what came out right."""
    contests = demo_contests(given["pools"], given["concurrency"][0], DEMO_WORKLOAD)
    with running("demo", contests, {}, None, fresh=True, **given) as run:
        for number in range(1, restarts + 1):
            for batch, rows in run_demo(run.bench, contests, number, run.tell(f"demo {number}/{restarts}")):
                run.store.add_batch(batch, rows)


@bench.command()
@COMMON
@option("--objective", "p95=100ms", Objective.parse, "The latency to keep.", "objective")
@option("--rates", "auto", _rates, "Tasks per second to offer, or auto.", "rates")
@option("--step step_s", "4s", partial(seconds, 0.5, 600), "Length of a step.", "duration")
@_whole("--sweeps", 5, 1, 100, "How often each knee is measured.")
@click.pass_context
def sweep(ctx: click.Context, /, objective: Objective, rates: Any, step_s: float, sweeps: int, **given: Any) -> None:
    """Offer more and more, whatever the worker does, until the latency objective breaks.

    Five sweeps for each worker pool, concurrency and workload, in random order, with the strategy `auto` unless
    --strategies names others; other patterns only if --baselines names them.
    """
    for name, usual in (("strategies", [AUTO]), ("baselines", [])):
        if ctx.get_parameter_source(name) is ParameterSource.DEFAULT:
            given[name] = usual
    chosen = SweepOptions(objective, step_s, rates, sweeps, given["checked_tasks"])
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
    with running("sweep", contests, options, user_task, **given) as run:
        store = run.store
        for workload, arm, number in todo:
            if (workload, arm.name, number) in store.swept:
                continue
            tell = run.tell(f"{workload}, {arm.name}")
            steps, rows = run_sweep(run.bench, arm, workload, chosen, number, store.next_slice, tell)
            store.add_sweep(steps, rows)
            kept, _ = knee_of(steps)
            wrong = [verdict for verdict in steps[-1].verdicts if not verdict.passed]
            found = f"{chosen.objective} {f'up to {kept.offered_per_s:g} tasks/s' if kept else 'at no rate'}"
            verdict = f"[bold red]BROKEN[/]: {wrong[0].name}: no" if wrong else found
            run.console.print(f"{workload:12} {arm.name:45} {number}/{chosen.sweeps} {verdict}", highlight=False)


@bench.command()
@click.argument("directory", type=DIRECTORY)
@click.option("--chart", metavar="CONTEST", help="Draw this contest, or `demo`, as chart.svg instead.")
def report(directory: Path, chart: str | None) -> None:
    """Write the report of a results directory again."""
    if chart is None:
        write_report(console_of_run(), directory)
        return
    from ..reports import write_chart

    try:
        write_chart(directory, chart, directory / "chart.svg")
    except LookupError as error:
        raise click.BadParameter(str(error), param_hint="--chart") from None


@bench.command()
@click.argument("a", type=DIRECTORY)
@click.argument("b", type=DIRECTORY)
def compare(a: Path, b: Path) -> None:
    """Compare result directory B with A: ratios with intervals, and what broke or healed.

    Exits with 1 if something that was right in A is broken in B.
    """
    from ..reports import compare as comparing

    found = comparing.compare(a, b)
    comparing.print_comparison(console_of_run(), found)
    sys.exit(bool(found.broken))
