"""What the benchmark may claim: percentiles, exact intervals, paired ratios, the A/A floor."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celery_alchemy.loadtests.bench.results import Batch, Slice
from celery_alchemy.loadtests.percentiles import Percentiles, nearest_rank
from celery_alchemy.loadtests.reports.statistics import (
    METRICS,
    NO_DIFFERENCE,
    Estimate,
    Metric,
    Pairs,
    compare_pairs,
    interval_rank,
    median_interval,
    noise_floor,
    paired_ratios,
    ratio_interval,
    verdict,
)

GOODPUT, CPU, DATABASE_CPU = METRICS["goodput"], METRICS["cpu"], METRICS["database_cpu"]
positive = st.floats(0.01, 100)


def make_slice(arm: str, turn: int, goodput: int, *, cpu_s: float = 1.0, tasks: int | None = None) -> Slice:
    latency = Percentiles(goodput, 10.0, 20.0, 30.0, 40.0) if goodput else None
    return Slice(
        number=turn, round=turn, position=0, arm=arm, seconds=1.0, succeeded=goodput, failed=0, unanswered=0,
        tasks=goodput if tasks is None else tasks, latency=latency, worker_cpu_s=cpu_s, database_cpu_s=None,
        generator_cpu_s=0.1, foreign_cpus=0.0, wall_s=1.2,
    )  # fmt: skip


def make_batch(number: int, **goodputs: Sequence[int]) -> Batch:
    slices = [make_slice(arm, turn, n) for arm, values in goodputs.items() for turn, n in enumerate(values, start=1)]
    return Batch("pools/x", number, "x", "a", [], slices)


def pairs(*batches: Sequence[float]) -> Pairs:
    return Pairs(dict(enumerate(batches, start=1)))


# Percentiles


def test_nearest_rank_gives_the_textbook_values() -> None:
    assert [nearest_rank([15, 20, 35, 40, 50], percent) for percent in (5, 30, 40, 50, 100)] == [15, 20, 20, 35, 50]


def test_percentiles_of_one_to_a_hundred() -> None:
    values = [float(value) for value in range(1, 101)]
    random.Random(3).shuffle(values)
    assert Percentiles.of(values) == Percentiles(100, 50.0, 95.0, 99.0, 100.0)


def test_percentiles_keep_hundredths_of_a_millisecond() -> None:
    assert Percentiles.of([2.396, 2.515]) == Percentiles(2, 2.4, 2.52, 2.52, 2.52)


def test_there_are_no_percentiles_of_nothing() -> None:
    assert Percentiles.of([]) is None


@given(st.lists(positive, min_size=1, max_size=300), st.integers(1, 100))
def test_a_percentile_is_the_smallest_value_that_enough_do_not_exceed(values: list[float], percent: int) -> None:
    ordered = sorted(values)
    found = nearest_rank(ordered, percent)
    assert found in ordered
    assert 100 * sum(value <= found for value in ordered) >= percent * len(ordered)
    assert 100 * sum(value < found for value in ordered) < percent * len(ordered)


# The interval of a median


@pytest.mark.parametrize(
    ("n", "left_out", "coverage"),
    [(6, 0, 1 - 2 / 64), (9, 1, 1 - 20 / 512), (10, 1, 1 - 22 / 1024), (20, 5, 0.958611), (30, 9, 0.957226)],
)
def test_the_interval_is_the_one_of_the_tables(n: int, left_out: int, coverage: float) -> None:
    found = interval_rank(n)
    assert found is not None
    assert found[0] == left_out
    assert found[1] == pytest.approx(coverage, abs=1e-6)


@pytest.mark.parametrize("n", range(1, 6))
def test_fewer_than_six_values_have_no_interval(n: int) -> None:
    assert interval_rank(n) is None
    assert median_interval([1.0] * n) == Estimate(n, 1.0)


@given(st.integers(6, 400))
def test_the_stated_coverage_is_enough_and_one_value_less_would_not_be(n: int) -> None:
    found = interval_rank(n)
    assert found is not None
    left_out, coverage = found
    assert coverage >= 0.95
    assert coverage == pytest.approx(1 - 2 * sum(math.comb(n, i) for i in range(left_out + 1)) / 2**n)
    assert 1 - 2 * sum(math.comb(n, i) for i in range(left_out + 2)) / 2**n < 0.95


@pytest.mark.parametrize("n", [6, 10, 30])
def test_the_interval_covers_the_median_as_often_as_it_says(n: int) -> None:
    """By simulation, of a distribution that is nothing like normal."""
    rng, trials, covered, coverage = random.Random(n), 4000, 0, 0.0
    true = math.exp(0.5)
    for _ in range(trials):
        found = median_interval(rng.lognormvariate(0.5, 1.2) for _ in range(n))
        assert found.low is not None
        assert found.high is not None
        assert found.coverage is not None
        covered, coverage = covered + (found.low <= true <= found.high), found.coverage
    deviation = math.sqrt(coverage * (1 - coverage) / trials)
    assert covered / trials == pytest.approx(coverage, abs=4 * deviation)


def test_there_is_no_median_of_nothing() -> None:
    with pytest.raises(ValueError, match="no values"):
        median_interval([])
    with pytest.raises(ValueError, match="no ratios"):
        ratio_interval([])


@given(st.lists(positive, min_size=1, max_size=60))
def test_the_interval_of_the_reciprocals_is_the_reciprocal(values: list[float]) -> None:
    straight, turned = ratio_interval(values), ratio_interval(1 / value for value in values)
    assert turned.median == pytest.approx(1 / straight.median)
    assert (turned.low is None) == (straight.low is None)
    if straight.low is not None and straight.high is not None:
        assert (turned.low, turned.high) == (pytest.approx(1 / straight.high), pytest.approx(1 / straight.low))
        assert straight.low <= straight.median <= straight.high


def test_ratios_may_be_nothing_and_infinite() -> None:
    assert ratio_interval([0.0, math.inf]).median == 1.0
    assert ratio_interval([0.0, 2.0]).median == 0.0
    assert ratio_interval([math.inf] * 6) == Estimate(6, math.inf, math.inf, math.inf, 1 - 2 / 64)


# Paired ratios


def test_slices_are_paired_by_round_and_batch() -> None:
    batches = [make_batch(1, a=[100, 200], b=[50, 400]), make_batch(2, a=[10], b=[30])]
    assert paired_ratios(batches, "b", "a", GOODPUT).by_batch == {1: [0.5, 2.0], 2: [3.0]}


def test_a_round_that_one_arm_missed_has_no_ratio() -> None:
    found = paired_ratios([make_batch(1, a=[100, 100, 100], b=[100, 150])], "b", "a", GOODPUT)
    assert found.by_batch == {1: [1.0, 1.5]}
    assert found.left_out == 1


def test_nothing_to_nothing_is_no_ratio_and_something_to_nothing_is_infinite() -> None:
    found = paired_ratios([make_batch(1, a=[0, 0, 10], b=[0, 5, 0])], "b", "a", GOODPUT)
    assert found.by_batch == {1: [math.inf, 0.0]}
    assert found.left_out == 1


def test_cpu_of_no_tasks_and_of_an_unseen_database_is_no_ratio() -> None:
    batch = make_batch(1, a=[0, 10], b=[10, 10])
    assert paired_ratios([batch], "b", "a", CPU).by_batch == {1: [1.0]}
    assert paired_ratios([batch], "b", "a", DATABASE_CPU).by_batch == {}
    assert paired_ratios([batch], "b", "a", METRICS["p95"]).left_out == 1
    free = replace(batch, slices=[replace(one, worker_cpu_s=0.0) for one in batch.slices])
    assert paired_ratios([free], "b", "a", CPU) == Pairs({}, 2)


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500)), min_size=1, max_size=40))
def test_swapping_the_arms_turns_the_ratio_over(values: list[tuple[int, int]]) -> None:
    batch = make_batch(1, a=[a for a, _ in values], b=[b for _, b in values])
    straight = paired_ratios([batch], "b", "a", GOODPUT)
    turned = paired_ratios([batch], "a", "b", GOODPUT)
    assert straight.left_out == turned.left_out
    turned_over = [math.inf if not ratio else 1 / ratio for ratio in straight.pooled]
    assert turned.pooled == pytest.approx(turned_over)


# What may be said

CALM = 1.05
"""An A/A floor."""


def said(floor: float | None, *batches: Sequence[float], metric: Metric = GOODPUT) -> tuple[str, str]:
    found = compare_pairs(pairs(*batches), metric, floor)
    assert found is not None
    assert found.verdict == verdict(found.estimate, found.batches, floor, metric)
    assert found.shown == (not found.reason)
    return found.verdict, found.reason


def test_a_clear_difference_is_named_in_the_right_direction() -> None:
    up, down = [1.2, 1.3, 1.25], [0.7, 0.8, 0.75]
    assert said(CALM, up, up, up) == ("faster", "")
    assert said(CALM, down, down, down) == ("slower", "")
    assert said(CALM, up, up, up, metric=CPU) == ("dearer", "")
    assert said(CALM, down, down, down, metric=CPU) == ("cheaper", "")
    assert said(CALM, up, up, up, metric=METRICS["p95"]) == ("slower", "")


def test_five_rounds_show_nothing_however_large() -> None:
    assert said(CALM, [9.0, 9.0, 9.0], [9.0, 9.0]) == (
        NO_DIFFERENCE, "5 rounds are too few for a 95 % interval, which takes 6"
    )  # fmt: skip


def test_an_interval_that_holds_one_shows_nothing() -> None:
    assert said(CALM, [0.8, 1.3, 1.2], [1.3, 0.9, 1.3]) == (NO_DIFFERENCE, "the interval holds 1")


def test_what_is_within_the_floor_shows_nothing_though_the_interval_excludes_one() -> None:
    steady = [1.03, 1.04, 1.05]
    assert said(1.06, steady, steady, steady) == (NO_DIFFERENCE, "within the A/A floor of 6 %")
    assert said(1.01, steady, steady, steady) == ("faster", "")


def test_without_a_floor_nothing_is_claimed() -> None:
    assert said(None, [2.0] * 10, [2.0] * 10) == (NO_DIFFERENCE, "no A/A arm shows the noise floor")


def test_a_difference_in_one_batch_only_is_not_claimed() -> None:
    large = [1.5] * 20
    assert said(CALM, large)[1].startswith("seen in one batch only")
    assert said(CALM, large, [0.99] * 5)[1] == "the batches disagree: only in 1 of 2 is it so"
    assert said(CALM, large, [1.01] * 5, [1.02] * 5)[1] == "beyond the A/A floor in one batch only"


def test_there_is_nothing_to_say_of_no_pairs() -> None:
    assert compare_pairs(Pairs({}), GOODPUT, CALM) is None


def test_the_floor_is_the_farthest_that_the_copy_got() -> None:
    calm = [1.0, 1.01, 0.99, 1.02, 1.0, 1.01]
    assert noise_floor([pairs(calm)]) == pytest.approx(1.02)
    assert noise_floor([pairs(calm, [0.8])]) == pytest.approx(1.25), "one worker that was slow as long as it lived"
    assert noise_floor([pairs([0.5, 1.0, 1.0])]) == pytest.approx(2.0), "too few for an interval: the extremes"
    assert noise_floor([pairs(calm), pairs([1.1] * 6)]) == pytest.approx(1.1)
    assert noise_floor([Pairs({})]) is None
    assert noise_floor([pairs([0.0] * 6)]) == math.inf


@given(st.lists(st.lists(positive, min_size=1, max_size=12), min_size=1, max_size=4), st.floats(1, 2))
def test_what_is_said_turns_over_with_the_ratio(batches: list[list[float]], floor: float) -> None:
    opposite = {"faster": "slower", "slower": "faster", NO_DIFFERENCE: NO_DIFFERENCE}
    straight, _ = said(floor, *batches)
    turned, _ = said(floor, *([1 / ratio for ratio in ratios] for ratios in batches))
    assert turned == opposite[straight]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_equal_arms_are_rarely_called_different(seed: int) -> None:
    """Of 60 contests between equals at most 3: the interval alone would let 5 % pass, the floor most of those not."""
    rng, claimed = random.Random(seed), 0
    for _ in range(60):
        bias = [rng.gauss(0, 0.02) for _ in range(6)]
        copy, arm = (
            pairs(*([math.exp(rng.gauss(worker, 0.1)) for _ in range(10)] for worker in bias[half : half + 3]))
            for half in (0, 3)
        )
        found = compare_pairs(arm, GOODPUT, noise_floor([copy]))
        claimed += bool(found and found.shown)
    assert claimed <= 3
