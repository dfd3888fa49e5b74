"""All workloads of a worker pool together: small differences show, luck does not, broken arms have no part in it."""

from dataclasses import replace
from pathlib import Path

import pytest
from support.bench_results import Plan, write_results

from celery_alchemy.loadtests.bench.results import Arm
from celery_alchemy.loadtests.reports.recommendation import recommend
from celery_alchemy.loadtests.reports.summary import Standing, summarise

PLAN = Plan(
    pools=("prefork",),
    workloads=("select", "insert", "transfer", "statements", "slow_query", "cpu"),
    baselines=("with_session",),
    batches=3,
    sweep=False,
)


def standing(directory: Path, plan: Plan, label: str) -> Standing:
    (found,) = [one for one in summarise(write_results(directory, plan)).standings if one.arm.label == label]
    return found


def faster_by(factor: float, pattern: str = "with_session", strategy: str = "") -> Plan:
    def speed(arm: Arm, workload: str) -> float:
        return factor if (arm.pattern, arm.strategy) == (pattern, strategy) else 1.0

    return replace(PLAN, speed=speed)


def test_its_workers_are_those_of_all_workloads(tmp_path: Path) -> None:
    found = standing(tmp_path, PLAN, "with_session")
    estimate = found.ratios["goodput"].estimate
    assert found.cells == len(PLAN.workloads)
    assert estimate.workers == len(PLAN.workloads) * PLAN.batches
    assert estimate.rounds == estimate.workers * PLAN.rounds


@pytest.mark.parametrize(("factor", "verdict"), [(1.15, "faster"), (0.85, "slower")])
def test_a_difference_that_one_contest_cannot_show_is_shown(tmp_path: Path, factor: float, verdict: str) -> None:
    found = standing(tmp_path, faster_by(factor), "with_session").ratios["goodput"]
    assert found.verdict == verdict
    assert abs(found.estimate.middle / factor - 1) < 0.05


def test_two_of_the_same_are_not_told_apart(tmp_path: Path) -> None:
    found = standing(tmp_path, faster_by(1.0), "celery-alchemy local").ratios
    assert {one.verdict for one in found.values()} == {"no difference shown"}


def test_too_few_workers_show_nothing(tmp_path: Path) -> None:
    found = standing(tmp_path, replace(faster_by(2.0), workloads=("select",)), "with_session").ratios["goodput"]
    assert found.verdict == "no difference shown"
    assert "too few" in found.reason


def test_where_it_is_broken_it_has_no_part(tmp_path: Path) -> None:
    plan = replace(PLAN, broken={("prefork", "with_session"): {"every task was answered": "8: 0c3f"}})
    found = standing(tmp_path / "one", plan, "with_session")
    assert (found.broken, found.cells, found.ratios) == (6, 6, {})
    assert standing(tmp_path / "two", plan, "celery-alchemy local").ratios


def test_auto_is_contradicted_by_all_workloads_together(tmp_path: Path) -> None:
    found = recommend(summarise(write_results(tmp_path, faster_by(1.15, "celery-alchemy", "local"))))
    (strategy,) = [one for one in found if one.topic == "Strategy"]
    assert (strategy.subject, strategy.choice, strategy.against) == ("under prefork", "local", "auto (per_process)")
    assert strategy.changed
    assert strategy.goodput
    assert strategy.goodput.estimate.middle == pytest.approx(1.15, rel=0.05)
