"""Two result directories: what changed, what broke, and which conditions fail."""

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
from celery_alchemy.loadtests.reports.compare import Comparison, Condition, compare, parse_condition, print_comparison

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


def conditions(*texts: str) -> list[Condition]:
    return [parse_condition(text) for text in texts]


def failed(found: Comparison) -> set[tuple[str, str]]:
    return {(str(failure.condition), failure.arm.pattern) for failure in found.failed}


@pytest.mark.parametrize(
    ("text", "metric", "limit"),
    [
        ("goodput:-10%", "goodput", 0.9),
        ("goodput:10%", "goodput", 0.9),
        ("p95:+20%", "p95", 1.2),
        (" database-cpu : +5.5 % ", "database_cpu", 1.055),
        ("pss:0%", "pss", 1.0),
        ("cpu:+150%", "cpu", 2.5),
    ],
)
def test_a_condition_says_how_much_worse_a_metric_may_become(text: str, metric: str, limit: float) -> None:
    found = parse_condition(text)
    assert (found.metric, found.limit) == (metric, pytest.approx(limit))
    assert parse_condition(str(found)) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("goodput", "is not a condition: write a metric and how much worse it may become: goodput:-10%"),
        ("speed:-10%", "'speed' in 'speed:-10%' cannot be compared. Known: goodput, cpu,"),
        ("goodput:-10", "'-10' in 'goodput:-10' has no unit: write for example goodput:-10%"),
        ("goodput:a lot", "'a lot' in 'goodput:a lot' is not a share: write for example goodput:-10%"),
        ("goodput:+10%", "would fail when things get better: goodput gets worse by falling; write goodput:-10%"),
        ("p95:-10%", "would fail when things get better: p95 gets worse by rising; write p95:+10%"),
        ("goodput:-100%", "can never fail"),
        ("", "is not a condition"),
    ],
)
def test_a_wrong_condition_says_what_to_write(text: str, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        parse_condition(text)
    assert message in str(raised.value)


def test_a_run_compared_with_itself_has_no_difference(pair: Pair) -> None:
    first, _ = pair()
    found = compare(first, first, conditions("goodput:-1%", "cpu:+1%", "p99:+1%", "pss:+1%"))
    assert {change.ratio.verdict for change in found.changes} == {"no difference shown"}
    assert found.failed == found.broken == found.healed == found.missing == []


def test_a_slower_arm_fails_the_condition_and_the_others_do_not(pair: Pair) -> None:
    first, second = pair(speed=lambda arm, workload: 0.7 if arm.pattern == "with_session" else 1.0)
    found = compare(first, second, conditions("goodput:-10%", "p95:+50%", "pss:+10%"))
    assert failed(found) == {("goodput:-10%", "with_session")}
    (change,) = [one for one in found.changes if one.arm.pattern == "with_session" and one.ratio.metric == "goodput"]
    assert change.ratio.verdict == "slower"
    estimate = change.ratio.estimate
    assert (estimate.workers, estimate.rounds) == (6, 24)
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.low < 0.7 < estimate.high < 0.9


def test_what_got_better_fails_nothing(pair: Pair) -> None:
    first, second = pair(speed=lambda arm, workload: 1.5)
    found = compare(first, second, conditions("goodput:-1%", "p50:+1%"))
    assert found.failed == []
    assert "faster" in {change.ratio.verdict for change in found.changes if change.ratio.metric == "goodput"}


def test_a_loss_within_the_limit_fails_nothing(pair: Pair) -> None:
    first, second = pair(speed=lambda arm, workload: 0.8)
    assert compare(first, second, conditions("goodput:-30%")).failed == []
    assert compare(first, second, conditions("goodput:-10%")).failed != []


def test_memory_is_compared_by_the_ranges_of_the_batches(pair: Pair) -> None:
    first, second = pair(pss=1.5)
    found = compare(first, second, conditions("pss:+20%"))
    assert {metric for metric, _ in failed(found)} == {"pss:+20%"}
    assert {one.ratio.verdict for one in found.changes if one.ratio.metric == "pss"} == {"larger"}


def test_an_arm_that_became_broken_is_named_and_fails_every_condition(pair: Pair) -> None:
    first, second = pair(broken={("prefork", "with_session"): BREACH})
    found = compare(first, second, conditions("goodput:-50%"))
    arm = Arm("prefork", 4, "with_session")
    assert found.broken == [("patterns/prefork/transfer", arm, "every task was answered: no. 3: a, b, c")]
    assert failed(found) == {("goodput:-50%", "with_session")}
    assert arm not in {change.arm for change in found.changes}
    back = compare(second, first, conditions("goodput:-50%"))
    assert back.healed == [("patterns/prefork/transfer", arm)]
    assert back.failed == []


def test_too_few_workers_are_never_a_failure(pair: Pair) -> None:
    first, second = pair(replace(SMALL, batches=3, rounds=20), speed=lambda arm, workload: 0.2)
    found = compare(first, second, conditions("goodput:-10%"))
    (reason,) = {one.ratio.reason for one in found.changes if one.ratio.metric == "goodput"}
    assert reason == "too few workers (3) for a 95 % interval, which takes 6"
    assert found.failed == []


def test_what_only_one_of_them_has_and_other_conditions_are_named(pair: Pair) -> None:
    first, second = pair(baselines=(), version="0.2.0", workloads=("transfer", "insert"), rounds=6)
    found = compare(first, second)
    assert "only in the first, patterns/prefork/transfer: prefork-4-with_session" in found.missing
    assert "only in the second: patterns/prefork/insert" in found.missing
    assert "different version: celery-alchemy 0.1.0 there, 0.2.0 here" in found.caveats
    assert "different option: matrix rounds 24 there, 36 here" in found.caveats
    assert not any("machine" in caveat for caveat in found.caveats[1:])


def test_runs_that_only_checked_can_be_compared(pair: Pair) -> None:
    first, second = pair(replace(SMALL, rounds=0), broken={("prefork", "with_session"): BREACH})
    found = compare(first, second, conditions("goodput:-10%"))
    assert [arm.pattern for _, arm, _ in found.broken] == ["with_session"]
    assert [str(one) for one in found.unchecked] == ["goodput:-10%"]
    assert found.changes == []


def test_it_is_printed_as_it_was_found(pair: Pair) -> None:
    first, second = pair(broken={("prefork", "with_session"): BREACH}, speed=lambda arm, workload: 0.5, version="0.2.0")
    out = StringIO()
    print_comparison(Console(file=out, width=110), compare(first, second, conditions("goodput:-10%")))
    text = " ".join(out.getvalue().split())
    assert "Broken now: patterns/prefork/transfer, with_session: every task was answered: no. 3: a, b, c" in text
    assert "Failed: goodput:-10%: patterns/prefork/transfer, celery-alchemy auto: goodput 0.5" in text
    assert "different version: celery-alchemy 0.1.0 there, 0.2.0 here" in text


def test_a_command_that_is_given_no_run_says_so(tmp_path: Path) -> None:
    for arguments in (["report", str(tmp_path)], ["compare", str(tmp_path), str(tmp_path)]):
        done = CliRunner().invoke(bench, arguments)
        assert done.exit_code == 2
        assert "holds no run of the benchmark: there is no run.sqlite in it." in " ".join(done.output.split())
