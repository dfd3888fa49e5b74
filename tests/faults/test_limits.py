"""Time limits that strike at any moment, also at the worst ones."""

import pytest
from support.databases import PostgreSQL, assert_not_busy
from support.worker import Start

TASKS = 60
LIMITS_S = [0.002 + 0.001 * number for number in range(TASKS)]


@pytest.mark.parametrize("strategy", ["local", "scoped", "per_process"])
@pytest.mark.parametrize(
    ("pool", "limit", "error"),
    [("prefork", "soft_time_limit", "SoftTimeLimitExceeded"), ("gevent", "time_limit", "TimeLimitExceeded")],
    ids=["prefork", "gevent"],
)
def test_limits_that_strike_anywhere_leak_nothing(
    start: Start, database: PostgreSQL, key: str, pool: str, strategy: str, limit: str, error: str
) -> None:
    """Sixty tasks with limits of 2 to 61 ms: no other error hides the limit, each task has all of its rows or none."""
    with start(pool, strategy=strategy) as worker:
        worker.call_together("meet", [(f"{key}-warm", worker.concurrency)] * worker.concurrency)
        ids = [worker.send("write_steadily", key, f"{limit_s:.3f}", **{limit: limit_s}) for limit_s in LIMITS_S]
        outcomes = [worker.wait(task_id, or_stored=True) for task_id in ids]
        assert error in {outcome.error for outcome in outcomes}, "no limit struck"
        # After `run` the limit can strike in Celery's own code, and be reported as, for example, an EncodeError.
        masked = [outcome for outcome in outcomes if outcome.error not in ("", error)]
        assert [outcome for outcome in masked if "sqlalchemy" in outcome.traceback] == []

        counted = "SELECT count(*) FROM rows_ WHERE key_ LIKE :keys AND note LIKE '0.%' GROUP BY note"
        assert set(database.column(counted, keys=f"{key}%")) <= {61}
        done = {f"{limit_s:.3f}" for limit_s, outcome in zip(LIMITS_S, outcomes, strict=True) if not outcome.error}
        assert done <= set(database.rows(key))

        assert_not_busy(database, worker.name)
        assert {report["checkedout"] for report in worker.probe()} == {0}
        after = worker.call_together("meet", [(f"{key}-after", worker.concurrency)] * worker.concurrency)
        assert all(outcome.value["same"] for outcome in after), after


def test_a_limit_during_mapper_configuration_spoils_no_later_task(start: Start, database: PostgreSQL, key: str) -> None:
    """SQLAlchemy remembers an interrupted configuration for as long as the process lives."""
    modules = ("endings", "sessions", "slow_models")
    with start("prefork", concurrency=1, modules=modules) as worker:
        worker.call("insert", key, "at the limit", soft_time_limit=0.3)
        outcome = worker.call("insert", key, "later")
        assert outcome.state == "SUCCESS", outcome
        assert "later" in database.rows(key)
