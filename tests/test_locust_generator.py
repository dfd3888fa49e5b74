"""The benchmark's load generator: one process that takes commands, and puts one worker after the other under load."""

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import URL
from support import locusts

STALL_S = 2.0
STALLED_MS = 1000.0


@pytest.fixture(scope="module")
def bank(postgresql_server: URL) -> Iterator[locusts.Bank]:
    with locusts.bank(postgresql_server) as found:
        yield found


@pytest.fixture
def generator(bank: locusts.Bank) -> Iterator[locusts.Generator]:
    generator = locusts.Generator()
    try:
        assert generator.ask(open=bank.arm) == {"opened": "bank"}
        yield generator
    finally:
        assert generator.close() == 0


def load(generator: locusts.Generator, **command: Any) -> dict[str, Any]:
    return generator.ask(slice={"number": 1, "arm": "bank", "workload": "transfer", **command})


def test_a_closed_slice_counts_what_ended_in_its_window(generator: locusts.Generator) -> None:
    for number, seconds in enumerate((1.0, 5.0, 20.0), 1):
        answer = load(generator, number=number, users=4, seconds=seconds, ramp_s=0.2)
        if answer["succeeded"]:
            break  # on a busy machine no task may have ended within the first second
    rows = [row for row in generator.rows if row.slice == number]
    low, high = answer["window"]
    assert high - low == pytest.approx(seconds)
    ended = [row for row in rows if low <= row.ended < high]
    assert answer["succeeded"] == len(ended) == answer["latency_ms"]["n"] > 0
    assert answer["tasks"] == len(rows)
    assert (answer["failed"], answer["unanswered"], answer["strangers"], answer["timed_out"]) == (0, 0, 0, False)
    assert answer["latency_ms"]["max"] == pytest.approx(max(row.latency_ms for row in ended), abs=0.02)


def test_no_more_tasks_are_in_flight_than_there_are_users(generator: locusts.Generator) -> None:
    load(generator, users=3, seconds=0.5)
    rows = generator.rows
    for row in rows:
        assert sum(other.sent <= row.sent < other.ended for other in rows) <= 3


def test_a_counted_slice_sends_exactly_as_many_tasks(generator: locusts.Generator) -> None:
    answer = load(generator, workload="mix", users=8, tasks=50)
    rows = generator.rows
    assert answer["tasks"] == answer["succeeded"] == len(rows) == 50
    # Tasks that raise as they are meant to have not failed, but are no successes to take the time of.
    assert Counter(row.outcome for row in rows) == {"success": 45, "failure": 5}
    assert answer["failed"] == 0
    assert answer["latency_ms"]["n"] == 45
    assert sum(row.attempts == 2 for row in rows) == 5


def test_numbers_are_never_used_twice_and_nothing_is_in_flight_between_slices(generator: locusts.Generator) -> None:
    windows = [load(generator, number=number, users=8, seconds=0.5) for number in (1, 2)]
    more = load(generator, number=3, users=8, tasks=20, first_number=1_000_000)
    rows = generator.rows
    assert len({row.number for row in rows}) == len({row.task_id for row in rows}) == len(rows)
    assert {row.number for row in rows if row.slice == 3} == set(range(1_000_000, 1_000_020))
    assert more["strangers"] == 0
    assert max(row.ended for row in rows if row.slice == 1) < min(row.sent for row in rows if row.slice == 2)
    assert all(answer["unanswered"] == 0 for answer in windows)


def test_arrivals_do_not_depend_on_the_answers(generator: locusts.Generator) -> None:
    answer = load(generator, workload="slow_io", rate_per_s=200.0, seconds=1.0)
    rows = generator.rows
    # 4 threads end 80 tasks of 50 ms in a second at most; 200 on average were sent all the same, with a standard
    # deviation of 14, at random distances: those vary as much as they are long.
    assert answer["tasks"] == len(rows) == answer["latency_ms"]["n"]
    assert 130 < len(rows) < 270
    steps = [later.intended - earlier.intended for earlier, later in itertools.pairwise(rows)]
    assert 0.5 < statistics.stdev(steps) / statistics.fmean(steps) < 1.5


def test_arrivals_show_a_stall_of_the_worker(generator: locusts.Generator, bank: locusts.Bank) -> None:
    """Two seconds of standstill are in the open model's p95; the closed model sees one slow task for each user."""
    slow = {}
    for model, command in {"open": {"rate_per_s": 20.0}, "closed": {"users": 4}}.items():
        before = len(generator.rows)
        generator.send(slice={"number": 1, "arm": "bank", "workload": "select", "seconds": 6.0, **command})
        time.sleep(1.0)
        with bank.stalled():
            time.sleep(STALL_S)
        answer = generator.answer()
        assert answer["unanswered"] == 0
        slow[model] = sum(row.latency_ms >= STALLED_MS for row in generator.rows[before:])
        if model == "open":
            assert answer["latency_ms"]["p95"] >= STALLED_MS
    assert slow["closed"] <= 4 < slow["open"]


def test_tasks_of_a_standing_worker_are_given_up_in_bounded_time(
    generator: locusts.Generator, bank: locusts.Bank
) -> None:
    with bank.stalled():
        answer = load(generator, users=2, seconds=1.0, drain_s=0.5)
    assert answer["timed_out"]
    sent = answer["tasks"]  # by each user one, if it got a processor in time
    assert answer["unanswered"] == sent > 0
    assert [row.outcome for row in generator.rows] == ["unanswered"] * sent
    after = load(generator, number=2, users=2, tasks=20)
    assert after["succeeded"] == 20
    # The late answers of the tasks that were given up are nobody's.
    assert after["strangers"] == sent


def test_somebody_elses_task_is_sent_with_its_arguments(generator: locusts.Generator) -> None:
    name = "celery_alchemy.loadtests.tasks.workloads.select"
    answer = load(generator, workload=None, task=name, args=[7], users=2, tasks=10)
    assert answer["succeeded"] == 10
    failing = load(generator, workload=None, task=name, args=[], kwargs={"no": 1}, users=2, tasks=10)
    assert failing["failed"] == 10
    assert [row.error_type for row in generator.rows[10:]] == ["TypeError"] * 10
    assert failing["latency_ms"] is None


@pytest.mark.parametrize(
    "command",
    [
        {"nonsense": 1},
        {"slice": {"number": 1, "arm": "nobody", "workload": "transfer", "seconds": 1.0}},
        {"slice": {"number": 1, "arm": "bank", "workload": "transfer"}},
        {"slice": {"number": 1, "arm": "bank", "workload": "transfer", "tasks": 1, "rate_per_s": 1.0}},
        {"slice": {"number": 1, "arm": "bank", "workload": "nonsense", "seconds": 1.0}},
    ],
)
def test_a_wrong_command_is_answered_and_the_process_goes_on(
    generator: locusts.Generator, command: dict[str, Any]
) -> None:
    assert set(generator.ask(**command)) == {"error"}
    assert load(generator, users=1, tasks=1)["succeeded"] == 1


def test_arms_are_closed_and_opened_again(generator: locusts.Generator, bank: locusts.Bank) -> None:
    assert generator.ask(close={"arm": "bank"}) == {"closed": "bank"}
    assert "error" in load(generator, users=1, tasks=1)
    assert generator.ask(open=bank.arm) == {"opened": "bank"}
    assert load(generator, users=1, tasks=1)["succeeded"] == 1
