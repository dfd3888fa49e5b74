"""Many async tasks, some of which fail, leave nothing behind in the process."""

import pytest
from support.databases import PostgreSQL
from support.faults import amount
from support.worker import Worker

pytestmark = pytest.mark.timeout(amount(180, 1800))
WARM, TASKS, WAVE = 400, amount(800, 20_000), 200
MOST_KB = 10 * 1024
"""More than so much would be seen after 20,000 tasks that leave one object of half a kilobyte each."""


def run(worker: Worker, key: str, tasks: int) -> None:
    for first in range(0, tasks, WAVE):
        ids = [worker.send("write", key, number) for number in range(first, first + WAVE)]
        outcomes = [worker.wait(task_id) for task_id in ids]
        assert [outcome.error for outcome in outcomes] == ["ValueError" * (number % 10 == 1) for number in range(WAVE)]


def test_memory_and_objects_stay(unharmed: Worker, database: PostgreSQL, key: str) -> None:
    """Sessions, transactions, jobs, coroutines, greenlets: as many afterwards as before. Threads that wait may keep the
    context of what they did last."""
    if unharmed.pool == "prefork":
        run(unharmed, key, WARM)
        return
    run(unharmed, key, WARM)
    before = unharmed.call("count_objects").value
    run(unharmed, key, TASKS)
    after = unharmed.call("count_objects").value
    print(f"after {WARM} tasks {before}, after {TASKS} more {after}")
    grown = {name: count - before["objects"].get(name, 0) for name, count in after["objects"].items()}
    assert {name: count for name, count in grown.items() if count > WAVE} == {}
    assert after["rss_kb"] - before["rss_kb"] < MOST_KB
    assert len(database.rows(key)) == (WARM + TASKS) * 9 // 10
