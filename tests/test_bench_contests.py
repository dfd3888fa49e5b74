"""What is compared with what, in which order, and which arguments are refused before anything starts."""

from collections import Counter

import pytest
from click.testing import CliRunner

from celery_alchemy.loadtests.bench.batches import Schedule, slice_length
from celery_alchemy.loadtests.bench.cells import RunningCell
from celery_alchemy.loadtests.bench.commands import bench
from celery_alchemy.loadtests.bench.contests import orders, patterns_contest, pools_contest
from celery_alchemy.loadtests.bench.results import Arm
from celery_alchemy.loadtests.bench.rows import TaskRow
from celery_alchemy.workers.selection import automatic

REFERENCE = Arm("threads", 4, "celery-alchemy", "auto")


def test_a_contest_has_its_reference_twice_and_every_other_way_once() -> None:
    contest = patterns_contest(
        "select", REFERENCE, ["local", "scoped", "per_process"], ["with_session", "recipe"], automatic()
    )
    labels = [arm.label for arm in contest.arms]
    # scoped is what auto chooses under threads: asking for it by name would be a third copy.
    assert labels == [
        "celery-alchemy auto",
        "celery-alchemy auto (again)",
        "celery-alchemy local",
        "celery-alchemy per_process",
        "with_session",
        "recipe",
    ]
    assert contest.reference == contest.arms[0]
    assert len({arm.name for arm in contest.arms}) == 6


def test_worker_pools_are_compared_at_each_concurrency() -> None:
    arms = [Arm(pool, number, "celery-alchemy", "auto") for pool in ("prefork", "gevent") for number in (4, 16)]
    contest = pools_contest("select", arms)
    assert [arm.copy for arm in contest.arms] == [0, 1, 0, 0, 0]
    assert contest.reference == arms[0]


def test_no_arm_gains_by_its_turn() -> None:
    """Over two rounds every arm has the same mean position; orders differ from pair to pair, reproducibly."""
    arms = [Arm("solo", 1, f"pattern{number}") for number in range(7)]
    rounds = list(orders(arms, 8, "seed"))
    for first, second in zip(rounds[::2], rounds[1::2], strict=True):
        assert first == second[::-1]
        assert set(first) == set(arms)
    positions: Counter[str] = Counter()
    for order in rounds:
        positions.update({arm.name: position for position, arm in enumerate(order)})
    assert set(positions.values()) == {8 * 3}
    assert len({tuple(arm.name for arm in order) for order in rounds}) > 4
    assert rounds == list(orders(arms, 8, "seed")) != list(orders(arms, 8, "other"))


def test_rounds_are_spread_over_the_restarts() -> None:
    schedule = Schedule(rounds=11, restarts=3, slice_s=1, ramp_s=0.1, checked_tasks=10)
    assert [schedule.rounds_of(number) for number in (1, 2, 3)] == [4, 4, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pools", "prefrk"], "'prefrk' is not a worker pool. Did you mean 'prefork'?"),
        (["--pools", ""], "names no worker pool"),
        (["--strategies", "scopd"], "'scopd' is not a session strategy. Did you mean 'scoped'?"),
        (["--baselines", "recipes"], "'recipes' is not a pattern to compare with. Did you mean 'recipe'?"),
        (["--workloads", "selct"], "'selct' is not a workload. Did you mean 'select'?"),
        (["--concurrency", "4,zero"], "write one or more whole numbers from 1 to 256"),
        (["--concurrency", "0"], "write one or more whole numbers from 1 to 256"),
        (["--slice", "1h"], "write a duration from 0.1s to 60s"),
        (["--rounds", "0"], "0 is not in the range"),
        (["--rounds", "2", "--restarts", "3"], "fewer rounds than restarts"),
        (["--args", "{}"], "'{}' is not a JSON list"),
        (["--kwargs", "[1"], "'[1' is not a JSON object"),
        (["--task", "proj.tasks.x"], "--task needs the app that has it: celery -A proj"),
        (["sweep", "--objective", "p90=1"], "'p90=1' is not a latency objective: write for example p95=50ms"),
        (["sweep", "--objective", "p95=0ms"], "is not a latency objective"),
        (["sweep", "--rates", "10,-1"], "write tasks per second, such as 10,20,40, or auto"),
        (["sweep", "--step", "0s"], "write a duration from 0.5s to 600s"),
        (["--pools", "solo", "check"], "Write the options after 'check': they belong to it."),
        (["compare", "nowhere", "nowhere"], "'nowhere' does not exist"),
    ],
)
def test_a_bad_argument_is_refused_before_anything_starts(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(bench, arguments)
    assert result.exit_code == 2
    # click wraps at the terminal's width.
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("latencies_ms", "seconds"),
    [([10, 50], 1.0), ([10, 500], 2.0), ([10, 60_000], 5.0), ([], 1.0)],
)
def test_slices_are_long_enough_for_the_slowest_arm(latencies_ms: list[float], seconds: float) -> None:
    """Of those that are not out: a hanging worker does not hold up the others."""
    cells = [cell_with(latency) for latency in latencies_ms] + [cell_with(90_000, out=True)]
    assert slice_length(cells, 1.0) == seconds


def cell_with(latency_ms: float, *, out: bool = False) -> RunningCell:
    cell = RunningCell(None, REFERENCE, "select")  # type: ignore[arg-type]
    ended = 1 + latency_ms / 1000
    cell.rows = [TaskRow(0, "arm", "select", 1, "id", 1.0, 1.0, 1.0, ended, "success", 1, 0.0, 0.0)] * 3
    cell.out = out
    return cell
