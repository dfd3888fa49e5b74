"""`celery alchemy bench`: which worker pool, strategy, concurrency and connection-pool size, and what they cost."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from . import arguments, runs
from .arguments import AUTO, OneOf, Value, json_of, numbers, seconds
from .batches import Schedule
from .results import Objective
from .sweep import SweepOptions

CONTEST = OneOf("kind of contest", ("patterns", "pools", "round-trips"))


def _option(name: str, default: Any, parse: Callable[[str], Any], text: str, kind: str = "names") -> Any:
    return click.option(*name.split(), default=default, type=Value(kind, parse), help=text)


def _whole(name: str, default: int, low: int, high: int, text: str) -> Any:
    return click.option(*name.split(), default=default, type=click.IntRange(low, high), help=text)


def _rates(value: str) -> tuple[float, ...]:
    message = "write tasks per second, such as 10,20,40, or auto."
    return () if value == "auto" else tuple(sorted(numbers(0.001, 100_000, float, message, value)))


# What every command that starts workers takes. One line each, to be read as a table.
# fmt: off
CONCURRENCIES = partial(numbers, 1, 256, int, "write one or more whole numbers from 1 to 256, such as 4 or 4,16.")
POOLS = _option("--pools", "all", arguments.POOL.several, "Worker pools, separated by commas.")
CONCURRENCY = _option("--concurrency", "4", CONCURRENCIES, "Pool processes, threads, greenlets; solo has 1.", "numbers")
SERVICES = (
    click.option("--database-url", envvar="DATABASE_URL", help="Server to create databases on; default: embedded."),
    click.option("--broker-url", envvar="BROKER_URL", help="Broker; default: an embedded Valkey."),
    click.option("--out", default="report", type=click.Path(file_okay=False, path_type=Path), help="Where results go."),
)
CHOSEN = (
    POOLS,
    _option("--strategies", "all", arguments.STRATEGY.several, "Session strategies; auto is always there."),
    _option("--baselines", "all", partial(arguments.BASELINE.several, none=True),
            "Hand-written patterns to compare with, all or none."),
    _option("--workloads", "all", arguments.WORKLOAD.several, "What the tasks do."),
    CONCURRENCY,
    _whole("--tasks checked_tasks", 50, 5, 100_000, "Checked tasks per pool slot."),
    _whole("--users users_per_slot", 2, 1, 100, "Tasks in flight per pool slot."),
    click.option("--task", help="Measure this task of the app given with `celery -A` instead of our workloads."),
    _option("--args", "[]", partial(json_of, list), "Its arguments: a JSON list.", "json"),
    _option("--kwargs", "{}", partial(json_of, dict), "Its keyword arguments: a JSON object.", "json"),
)
FRESH = click.option("--fresh", is_flag=True, help="Remove the results in --out first, instead of going on with them.")
DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)
# fmt: on


def options(*decorators: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[..., Any]:
    """Return one decorator for several options, in the order the help shows them."""

    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


COMMON = options(*CHOSEN, *SERVICES, FRESH)


@click.group(
    invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "show_default": True}
)
@COMMON
@_option("--contests", "all", CONTEST.several, "What to compare: see below.")
@_whole("--rounds", 40, 1, 1000, "Slices for each arm, over all restarts.")
@_option("--slice slice_s", "500ms", partial(seconds, 0.1, 60), "Of what length.", "duration")
@_whole("--restarts", 10, 1, 50, "How often the workers start anew.")
@click.option(
    "--only", multiple=True, metavar="PATTERN", help="Of these contests, such as 'pools/*', now; the rest another time."
)
@click.pass_context
def bench(ctx: click.Context, /, **given: Any) -> None:
    """Compare worker pools and session patterns, in turns, on real workers, and write a report.

    Speed counts only where results are right: each worker is checked first. A run that was interrupted goes on where
    it stopped when the same command is given again.

    Contests: `patterns` compares our strategies and the hand-written patterns under each worker pool; `pools` the
    worker pools and concurrencies, each with the strategy it gets by itself; `round-trips` counts how often a task
    waits for the database's answer.
    """
    given_here = [name for name in given if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if ctx.invoked_subcommand is None:
        _bench(ctx, **given)
    elif given_here:
        raise click.UsageError(f"Write the options after {ctx.invoked_subcommand!r}: they belong to it.", ctx)


def _bench(
    ctx: click.Context, contests: list[str], rounds: int, slice_s: float, restarts: int, only: tuple[str, ...],
    **given: Any,
) -> None:  # fmt: skip
    if rounds < restarts:
        raise click.BadParameter("fewer rounds than restarts.", param_hint="--rounds")
    load = (given["checked_tasks"], given["users_per_slot"])
    schedule = Schedule(rounds, restarts, slice_s, min(0.1, slice_s / 5), *load)
    runs.matrix_run(ctx, contests, schedule, only, **given)


@bench.command()
@COMMON
@click.pass_context
def check(ctx: click.Context, /, **given: Any) -> None:
    """Check correctness only, for CI: a load for each worker, every invariant, no timing."""
    schedule = Schedule(0, 1, 1.0, 0.1, given["checked_tasks"], given["users_per_slot"])
    runs.matrix_run(ctx, ["patterns"], schedule, (), **given)


@bench.command()
@options(POOLS, CONCURRENCY, *SERVICES)
def demo(**given: Any) -> None:
    """Let the hand-written recipe and celery-alchemy do the same work, and count what came out right."""
    runs.demo_run(**given)


@bench.command()
@COMMON
@_option("--objective", "p95=100ms", Objective.parse, "The latency to keep.", "objective")
@_option("--rates", "auto", _rates, "Tasks per second to offer, or auto.", "rates")
@_option("--step step_s", "4s", partial(seconds, 0.5, 600), "Length of a step.", "duration")
@_whole("--sweeps", 5, 1, 100, "How often each knee is measured.")
@click.pass_context
def sweep(ctx: click.Context, /, objective: Objective, rates: Any, step_s: float, sweeps: int, **given: Any) -> None:
    """Offer more and more, whatever the worker does, until the latency objective breaks.

    Five sweeps for each worker pool, concurrency and workload, in random order, with the strategy `auto` unless
    --strategies names others; hand-written patterns only if --baselines names them.
    """
    for name, usual in (("strategies", [AUTO]), ("baselines", [])):
        if ctx.get_parameter_source(name) is ParameterSource.DEFAULT:
            given[name] = usual
    chosen = SweepOptions(objective, step_s, rates, sweeps, given["checked_tasks"], given["users_per_slot"])
    runs.sweep_run(ctx, chosen, **given)


@bench.command()
@click.argument("directory", type=DIRECTORY)
@click.option("--chart", metavar="CONTEST", help="Write this contest's ratios as chart.svg instead, for a README.")
def report(directory: Path, chart: str | None) -> None:
    """Write the report of a results directory again."""
    if chart is None:
        runs.write_report(runs.console_of_run(), directory)
        return
    from ..reports import write_chart

    try:
        write_chart(directory, chart, directory / "chart.svg")
    except LookupError as error:
        raise click.BadParameter(str(error), param_hint="--chart") from None


@bench.command()
@click.argument("a", type=DIRECTORY)
@click.argument("b", type=DIRECTORY)
@click.option("--fail-if", "conditions", multiple=True, help="Such as goodput:-10% or p95:+20%; may be repeated.")
def compare(a: Path, b: Path, conditions: tuple[str, ...]) -> None:
    """Compare result directory B with A: ratios with intervals, and what broke or healed.

    Exits with 1 if a condition fails, or cannot be checked: what nobody measured is no success.
    """
    from ..reports.compare import compare as compare_results
    from ..reports.compare import parse_condition, print_comparison

    try:
        parsed = [parse_condition(text) for text in conditions]
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--fail-if") from None
    found = compare_results(a, b, parsed)
    print_comparison(runs.console_of_run(), found)
    sys.exit(1 if found.failed or found.unchecked else 0)
