"""Two result directories: what changed, and what broke."""

from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console
from support.bench_results import Plan, write_results

from celery_alchemy.loadtests.bench.commands import bench
from celery_alchemy.loadtests.bench.results import Arm
from celery_alchemy.loadtests.reports.compare import compare, print_comparison

SMALL = Plan(
    pools=("prefork",), workloads=("transfer",), baselines=("with_session",), concurrencies=(), sweep=False, broken={}
)
BREACH = {"every task was answered": "3: a, b, c"}

Pair = Callable[..., tuple[Path, Path]]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """Write two runs; keywords are what the second one differs in."""

    def write(first: Plan = SMALL, **changed: object) -> tuple[Path, Path]:
        second = replace(first, **{"seed": first.seed + 1, **changed})  # type: ignore[arg-type]
        return write_results(tmp_path / "a", first), write_results(tmp_path / "b", second)

    return write


def test_a_run_compared_with_itself_has_no_difference(pair: Pair) -> None:
    first, _ = pair()
    found = compare(first, first)
    assert {change.ratio.verdict for change in found.changes} == {"no difference shown"}
    assert found.broken == found.healed == found.missing == []


def test_a_slower_arm_is_named_and_the_others_are_not(pair: Pair) -> None:
    first, second = pair(speed=lambda arm, workload: 0.7 if arm.pattern == "with_session" else 1.0)
    shown = [one for one in compare(first, second).changes if one.ratio.metric == "goodput" and not one.ratio.reason]
    (change,) = shown
    assert change.arm.pattern == "with_session"
    assert change.ratio.verdict == "slower"
    estimate = change.ratio.estimate
    assert (estimate.workers, estimate.rounds) == (6, 24)
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.low < 0.7 < estimate.high < 0.9


def test_what_got_better_is_called_better(pair: Pair) -> None:
    first, second = pair(speed=lambda arm, workload: 1.5)
    found = compare(first, second)
    assert {change.ratio.verdict for change in found.changes if change.ratio.metric == "goodput"} == {"faster"}


def test_an_arm_that_became_broken_is_named_with_its_breach_and_has_no_ratio(pair: Pair) -> None:
    first, second = pair(broken={("prefork", "with_session"): BREACH})
    found = compare(first, second)
    place = "patterns/prefork/transfer, with_session"
    assert found.broken == [f"{place}: every task was answered: no. 3: a, b, c"]
    assert Arm("prefork", 4, "with_session") not in {change.arm for change in found.changes}
    back = compare(second, first)
    assert (back.broken, back.healed) == ([], [place])
    for code, two in ((1, (first, second)), (0, (second, first))):
        assert CliRunner().invoke(bench, ["compare", *map(str, two)]).exit_code == code


def test_too_few_workers_show_nothing(pair: Pair) -> None:
    first, second = pair(replace(SMALL, batches=3, rounds=20), speed=lambda arm, workload: 0.2)
    (reason,) = {one.ratio.reason for one in compare(first, second).changes if one.ratio.metric == "goodput"}
    assert reason == "too few workers (3) for a 95 % interval, which takes 6"


def test_what_only_one_of_them_has_is_named(pair: Pair) -> None:
    first, second = pair(baselines=(), workloads=("transfer", "insert"))
    assert compare(first, second).missing == ["patterns/prefork/transfer, with_session", "patterns/prefork/insert"]


def test_runs_that_only_checked_can_be_compared(pair: Pair) -> None:
    first, second = pair(replace(SMALL, rounds=0), broken={("prefork", "with_session"): BREACH})
    found = compare(first, second)
    assert len(found.broken) == 1
    assert found.changes == []


def test_it_is_printed_as_it_was_found(pair: Pair) -> None:
    first, second = pair(broken={("prefork", "with_session"): BREACH}, speed=lambda arm, workload: 0.5)
    out = StringIO()
    print_comparison(Console(file=out, width=110), compare(first, second))
    text = " ".join(out.getvalue().split())
    assert "Broken now: patterns/prefork/transfer, with_session: every task was answered: no. 3: a, b, c" in text
    assert "patterns/prefork/transfer, celery-alchemy auto goodput 0.5" in text


def test_a_command_that_is_given_no_run_says_so(tmp_path: Path) -> None:
    for arguments in (["report", str(tmp_path)], ["compare", str(tmp_path), str(tmp_path)]):
        done = CliRunner().invoke(bench, arguments)
        assert done.exit_code == 2
        assert "holds no run of the benchmark: there is no run.sqlite in it." in " ".join(done.output.split())
