"""`celery alchemy bench`: which worker pool, strategy, concurrency and connection-pool size, and what they cost."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from . import runs
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
from .contests import AUTO
from .matrix import MatrixOptions
from .objective import Objective
from .sweep import SweepOptions

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
    if ctx.invoked_subcommand is None:
        _bench(ctx, **given)
        return
    source = click.core.ParameterSource.COMMANDLINE
    misplaced = [name for name in given if ctx.get_parameter_source(name) is source]
    if misplaced:
        raise click.UsageError(f"Write the options after {ctx.invoked_subcommand!r}: they belong to it.", ctx)


def _bench(
    ctx: click.Context,
    contests: list[str],
    rounds: int,
    slice_s: float,
    restarts: int,
    only: tuple[str, ...],
    **given: Any,
) -> None:
    matrix = MatrixOptions(
        rounds, restarts, slice_s, min(0.1, slice_s / 5), given["checked_tasks"], given["users_per_slot"]
    )
    if rounds < restarts:
        raise click.BadParameter("fewer rounds than restarts.", param_hint="--rounds")
    failed = runs.matrix_run(ctx, contests, matrix, only, **given)
    sys.exit(1 if failed else 0)


@bench.command()
@COMMON
@click.pass_context
def check(ctx: click.Context, /, **given: Any) -> None:
    """Check correctness only, for CI: a load for each worker, every invariant, no timing."""
    matrix = MatrixOptions(0, 1, 1.0, 0.1, given["checked_tasks"], given["users_per_slot"])
    sys.exit(1 if runs.matrix_run(ctx, ["patterns"], matrix, (), **given) else 0)


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
    sys.exit(1 if runs.sweep_run(ctx, chosen, **given) else 0)


@bench.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
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
@click.argument("a", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("b", type=click.Path(exists=True, file_okay=False, path_type=Path))
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
