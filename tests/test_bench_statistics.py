"""What the benchmark may claim: percentiles, intervals of workers and their rounds, paired ratios, the A/A floor."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celery_alchemy.loadtests.bench.results import Batch, Slice
from celery_alchemy.loadtests.bench.rows import Percentiles, nearest_rank
from celery_alchemy.loadtests.reports.histogram import hgrm
from celery_alchemy.loadtests.reports.statistics import (
    METRICS,
    NO_DIFFERENCE,
    Estimate,
    Metric,
    distance,
    estimate,
    judged,
    noise_floor,
    paired_ratios,
)

GOODPUT, CPU, DATABASE_CPU = METRICS["goodput"], METRICS["cpu"], METRICS["database_cpu"]
positive = st.floats(0.01, 100)
groups_of_workers = st.lists(st.lists(positive, min_size=1, max_size=6), min_size=1, max_size=12)


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


def simulated(rng: random.Random, workers: int, rounds: int, between: float, within: float) -> list[list[float]]:
    """Return ratios whose true middle is 1: each worker off for as long as it lives, each round a little more."""
    middles = [rng.gauss(0, between) for _ in range(workers)]
    return [[math.exp(rng.gauss(middle, within)) for _ in range(rounds)] for middle in middles]


# Percentiles


def test_nearest_rank_gives_the_textbook_values() -> None:
    assert [nearest_rank([15, 20, 35, 40, 50], percent) for percent in (5, 30, 40, 50, 100)] == [15, 20, 20, 35, 50]


def test_percentiles_of_one_to_ten_thousand() -> None:
    values = [float(value) for value in range(1, 10_001)]
    random.Random(3).shuffle(values)
    assert Percentiles.of(values) == Percentiles(10_000, 5000.0, 9500.0, 9900.0, 10_000.0, 9990.0)


def test_percentiles_keep_hundredths_of_a_millisecond() -> None:
    assert Percentiles.of([2.396, 2.515]) == Percentiles(2, 2.4, 2.52, 2.52, 2.52, 2.52)


def test_there_are_no_percentiles_of_nothing() -> None:
    assert Percentiles.of([]) is None


@given(st.lists(positive, min_size=1, max_size=300), st.integers(1, 100))
def test_a_percentile_is_the_smallest_value_that_enough_do_not_exceed(values: list[float], percent: int) -> None:
    ordered = sorted(values)
    found = nearest_rank(ordered, percent)
    assert found in ordered
    assert 100 * sum(value <= found for value in ordered) >= percent * len(ordered)
    assert 100 * sum(value < found for value in ordered) < percent * len(ordered)


# Histogram files


def test_a_histogram_file_has_the_standard_form_and_the_exact_values() -> None:
    text = hgrm(float(value) for value in range(1, 1001))
    lines = text.splitlines()
    assert lines[0].split() == ["Value", "Percentile", "TotalCount", "1/(1-Percentile)"]
    rows = [[float(word) for word in line.split()] for line in lines if line and line.lstrip()[0].isdigit()]
    by_share = {row[1]: row for row in rows}
    assert by_share[0.0][:1] == [1.0]
    assert by_share[0.5] == [500.0, 0.5, 500, 2.0]
    assert by_share[0.9][0] == 900.0
    assert by_share[0.9375] == [938.0, 0.9375, 938, 16.0]
    assert rows[-1] == [1000.0, 1.0, 1000.0]
    assert [row[1] for row in rows] == sorted(row[1] for row in rows)
    assert any(row[1] > 0.998 for row in rows[:-1]), "as far as a thousand values reach"
    assert "#[Mean    =      500.500, StdDeviation   =      288.675]" in lines
    assert "#[Max     =     1000.000, Total count    =         1000]" in lines


def test_there_is_no_histogram_of_nothing() -> None:
    with pytest.raises(ValueError, match="no values"):
        hgrm([])


# The interval


def test_workers_without_any_difference_have_an_interval_of_no_width() -> None:
    assert estimate([[2.0, 2.0, 2.0]] * 8) == Estimate(
        8, 24, pytest.approx(2.0), pytest.approx(2.0), pytest.approx(2.0)
    )


def test_the_middle_is_the_geometric_mean_of_the_workers_medians() -> None:
    found = estimate([[0.5, 0.5, 90.0], [2.0], [4.0, 4.0]])
    assert (found.workers, found.rounds) == (3, 6)
    assert found.middle == pytest.approx(4 ** (1 / 3))


@pytest.mark.parametrize("workers", range(1, 6))
def test_fewer_than_six_workers_have_no_interval_however_many_rounds(workers: int) -> None:
    found = estimate([[1.0, 1.1, 0.9] * 100] * workers)
    assert (found.low, found.high) == (None, None)


def test_the_same_values_have_the_same_interval() -> None:
    groups = simulated(random.Random(5), 10, 3, 0.05, 0.1)
    assert estimate(groups) == estimate(groups)


@pytest.mark.parametrize(("workers", "t"), [(6, 2.5706), (10, 2.2622), (20, 2.0930), (30, 2.0452)])
def test_with_one_round_each_it_is_students_interval(workers: int, t: float) -> None:
    """Known without simulation: mean and standard deviation of the logarithms, and the quantile from the tables."""
    rng = random.Random(workers)
    logs = [rng.gauss(0, 0.1) for _ in range(workers)]
    mean = sum(logs) / workers
    half = t * math.sqrt(sum((one - mean) ** 2 for one in logs) / (workers - 1) / workers)
    found = estimate([[math.exp(one)] for one in logs])
    assert found.low is not None
    assert found.high is not None
    assert math.log(found.low) == pytest.approx(mean - half, abs=0.2 * half)
    assert math.log(found.high) == pytest.approx(mean + half, abs=0.2 * half)


@pytest.mark.parametrize(
    ("workers", "rounds", "between"),
    [(6, 1, 0.05), (6, 5, 0.05), (10, 3, 0.05), (10, 9, 0.2), (10, 3, 0.0), (27, 3, 0.05)],
)
def test_the_interval_covers_the_true_middle(workers: int, rounds: int, between: float) -> None:
    """Where workers differ much, little, or not at all: in 95 of 100 runs, less what 200 trials can miss."""
    rng, trials = random.Random(workers * rounds), 200
    found = [estimate(simulated(rng, workers, rounds, between, 0.1)) for _ in range(trials)]
    covered = sum(one.low <= 1 <= one.high for one in found if one.low is not None and one.high is not None)
    assert covered / trials >= 0.95 - 2 * math.sqrt(0.95 * 0.05 / trials)


def test_many_rounds_of_few_workers_do_not_make_an_interval_narrow() -> None:
    """As if each round were a worker: that interval covers far less often than it says, so workers are drawn first."""
    rng, trials = random.Random(7), 100
    pooled = right = 0
    for _ in range(trials):
        groups = simulated(rng, 10, 9, 0.05, 0.1)
        as_workers = estimate([[ratio] for ratios in groups for ratio in ratios])
        pooled += not as_workers.excludes_one
        right += not estimate(groups).excludes_one
    assert pooled / trials < 0.88
    assert right / trials >= 0.92


def test_there_is_no_middle_of_nothing() -> None:
    with pytest.raises(ValueError, match="no values"):
        estimate([])
    with pytest.raises(ValueError, match="no values"):
        estimate([[1.0]], [])


@settings(deadline=None, max_examples=40)
@given(groups_of_workers)
def test_the_middle_of_the_reciprocals_is_the_reciprocal(groups: list[list[float]]) -> None:
    straight, turned = estimate(groups), estimate([[1 / ratio for ratio in ratios] for ratios in groups])
    assert turned.middle == pytest.approx(1 / straight.middle)
    if straight.low is not None and straight.high is not None:
        assert straight.low <= straight.middle * 1.0001
        assert straight.high >= straight.middle * 0.9999


def test_a_slice_without_success_counts_and_is_not_infinite() -> None:
    assert estimate([[0.0, math.inf]]).middle == pytest.approx(1.0)
    assert estimate([[math.inf]] * 6).middle == pytest.approx(1000.0)
    assert estimate([[1.0, 1.0, 0.0]]).middle == pytest.approx(1.0), "one of three does not decide"


def test_a_quotient_is_of_workers_that_did_not_take_turns() -> None:
    rng = random.Random(11)
    before = [[100 * ratio for ratio in ratios] for ratios in simulated(rng, 10, 3, 0.03, 0.05)]
    after = [[70 * ratio for ratio in ratios] for ratios in simulated(rng, 8, 4, 0.03, 0.05)]
    found = estimate(after, before)
    assert (found.workers, found.rounds) == (8, 30)
    assert found.low is not None
    assert found.high is not None
    assert 0.6 < found.low < 0.7 < found.high < 0.8
    assert estimate(before, before).middle == pytest.approx(1.0)


# Paired ratios


def test_slices_are_paired_by_round_and_batch() -> None:
    batches = [make_batch(1, a=[100, 200], b=[50, 400]), make_batch(2, a=[10], b=[30])]
    assert paired_ratios(batches, "b", "a", GOODPUT) == [[0.5, 2.0], [3.0]]


def test_a_round_that_one_arm_missed_has_no_ratio() -> None:
    assert paired_ratios([make_batch(1, a=[100, 100, 100], b=[100, 150])], "b", "a", GOODPUT) == [[1.0, 1.5]]


def test_nothing_to_nothing_is_no_ratio_and_something_to_nothing_is_infinite() -> None:
    assert paired_ratios([make_batch(1, a=[0, 0, 10], b=[0, 5, 0])], "b", "a", GOODPUT) == [[math.inf, 0.0]]


def test_cpu_of_no_tasks_and_of_an_unseen_database_is_no_ratio() -> None:
    batch = make_batch(1, a=[0, 10], b=[10, 10])
    assert paired_ratios([batch], "b", "a", CPU) == [[1.0]]
    assert paired_ratios([batch], "b", "a", DATABASE_CPU) == []
    free = replace(batch, slices=[replace(one, worker_cpu_s=0.0) for one in batch.slices])
    assert paired_ratios([free], "b", "a", CPU) == []


# What may be said

CALM = 1.05
"""An A/A floor."""


def said(floor: float | None, *workers: Sequence[float], metric: Metric = GOODPUT) -> tuple[str, str]:
    found = judged(estimate(workers), metric, floor)
    assert (found.better or found.worse) == (not found.reason)
    return found.verdict, found.reason


def test_a_clear_difference_is_named_in_the_right_direction() -> None:
    up, down = [[1.2, 1.3, 1.25]] * 6, [[0.7, 0.8, 0.75]] * 6
    assert said(CALM, *up) == ("faster", "")
    assert said(CALM, *down) == ("slower", "")
    assert said(CALM, *up, metric=CPU) == ("dearer", "")
    assert said(CALM, *down, metric=CPU) == ("cheaper", "")
    assert said(CALM, *up, metric=METRICS["p95"]) == ("slower", "")


def test_five_workers_show_nothing_however_large() -> None:
    few = "too few workers (5) for a 95 % interval, which takes 6"
    assert said(CALM, *[[9.0] * 50] * 5) == (NO_DIFFERENCE, few)


def test_one_worker_that_was_lucky_shows_nothing() -> None:
    assert said(CALM, [1.5] * 20, *[[1.0, 1.01, 0.99]] * 7) == (NO_DIFFERENCE, "the interval holds 1")


def test_what_is_within_the_floor_shows_nothing_though_the_interval_excludes_one() -> None:
    steady = [[1.03, 1.04, 1.05]] * 6
    assert said(1.06, *steady) == (NO_DIFFERENCE, "within the A/A floor of 6.0 %")
    assert said(1.01, *steady) == ("faster", "")


def test_without_a_floor_nothing_is_claimed() -> None:
    assert said(None, *[[2.0] * 10] * 6) == (NO_DIFFERENCE, "no A/A arm shows the noise floor")


def test_the_floor_is_the_farthest_that_the_copy_got() -> None:
    assert noise_floor([[[1.1]] * 6]) == pytest.approx(1.1)
    assert noise_floor([[[1.0]] * 6, [[0.8]] * 6]) == pytest.approx(1.25)
    assert noise_floor([[[1.0, 1.02], [0.8]]]) == pytest.approx(1.25), "too few for an interval: the farthest worker"
    assert noise_floor([[]]) is None
    assert distance(0.0) == math.inf


def test_equal_arms_are_rarely_called_different() -> None:
    """Of 100 contests between equals at most 3: the interval alone would let 5 pass, the floor most of those not."""
    rng, claimed = random.Random(20261127), 0
    for _ in range(100):
        copy, arm = (simulated(rng, 10, 3, 0.03, 0.1) for _ in range(2))
        claimed += not judged(estimate(arm), GOODPUT, noise_floor([copy])).reason
    assert claimed <= 3


def test_a_difference_of_a_tenth_is_found() -> None:
    rng, found = random.Random(3), 0
    for _ in range(50):
        slower = [[0.9 * ratio for ratio in ratios] for ratios in simulated(rng, 10, 3, 0.03, 0.05)]
        found += said(noise_floor([simulated(rng, 10, 3, 0.03, 0.05)]), *slower)[0] == "slower"
    assert found >= 45
