"""Tasks that call tasks, and units of work inside tasks, for every strategy under every worker pool."""

import pytest
from support.databases import Database
from support.worker import Worker

UNTOUCHED = {"own": True, "db.session is inner": True, "outer untouched": True, "db.session is outer": True}


@pytest.mark.parametrize(
    ("inner_fails", "outer_fails", "rows"),
    [(False, False, ["outer", "inner"]), (True, False, ["outer"]), (False, True, ["inner"]), (True, True, [])],
    ids=["both-end-well", "inner-fails", "outer-fails", "both-fail"],
)
def test_a_unit_of_work_inside_a_task_is_its_own(
    worker: Worker, key: str, database: Database, inner_fails: bool, outer_fails: bool, rows: list[str]
) -> None:
    outcome = worker.call("unit_inside", key, inner_fails, outer_fails)
    assert outcome.state == ("FAILURE" if outer_fails else "SUCCESS"), outcome
    seen = worker.said(key)[0] if outer_fails else outcome.value
    assert seen == UNTOUCHED
    assert sorted(database.rows(key)) == sorted(rows)


@pytest.mark.parametrize(
    ("callee_fails", "caller_fails", "rows"),
    [
        (False, False, ["caller", "callee", "caller again"]),
        (True, False, ["caller", "callee", "caller again"]),
        (False, True, []),
    ],
    ids=["ends-well", "caught-inner-error", "caller-fails"],
)
def test_a_task_called_like_a_function_joins(
    worker: Worker, key: str, database: Database, callee_fails: bool, caller_fails: bool, rows: list[str]
) -> None:
    """Same Session, no ending of its own: a caught inner exception rolls nothing back, an outer one everything."""
    outcome = worker.call("caller", key, callee_fails, caller_fails)
    assert (outcome.state, outcome.value) == (("FAILURE", None) if caller_fails else ("SUCCESS", True)), outcome
    assert database.rows(key) == rows


@pytest.mark.def_only  # a task that is no coroutine cannot await another
@pytest.mark.parametrize(("callee_fails", "rows"), [(False, ["callee"]), (True, [])])
def test_called_where_no_unit_of_work_is_open_it_opens_its_own(
    worker: Worker, key: str, database: Database, callee_fails: bool, rows: list[str]
) -> None:
    """Here by a task that is no DatabaseTask."""
    assert worker.call("plain_caller", key, callee_fails).state == "SUCCESS"
    assert database.rows(key) == rows


def test_a_task_called_like_a_function_has_the_settings_of_its_caller(
    worker: Worker, key: str, database: Database
) -> None:
    assert worker.call("caller_of_discarding", key).value is True
    assert database.rows(key) == ["callee"]


@pytest.mark.parametrize(("fails", "rows"), [(False, ["depth 3", "depth 2", "depth 1", "depth 0"]), (True, [])])
def test_recursion_is_one_unit_of_work(
    worker: Worker, key: str, database: Database, fails: bool, rows: list[str]
) -> None:
    outcome = worker.call("recurse", key, 3, fails)
    assert outcome.state == ("FAILURE" if fails else "SUCCESS"), outcome
    if not fails:
        assert len(outcome.value) == 4
        assert len(set(outcome.value)) == 1
    assert database.rows(key) == rows


@pytest.mark.parametrize(
    ("inner_fails", "outer_fails", "rows"),
    [(False, False, ["outer", "inner"]), (True, False, ["outer"]), (False, True, ["inner"])],
    ids=["both-end-well", "inner-rollback-leaves-outer-work", "inner-commit-does-not-commit-outer"],
)
def test_apply_inside_a_task_has_its_own_session(
    worker: Worker, key: str, database: Database, inner_fails: bool, outer_fails: bool, rows: list[str]
) -> None:
    outcome = worker.call("apply_inside", key, inner_fails, outer_fails)
    assert outcome.state == ("FAILURE" if outer_fails else "SUCCESS"), outcome
    assert outcome.error == ("Boom" if outer_fails else ""), outcome
    assert sorted(database.rows(key)) == sorted(rows)


def test_a_nested_unit_of_work_never_queues_for_a_connection(worker: Worker, key: str, database: Database) -> None:
    """All tasks hold a connection, each opens a second unit, and none lets go before all have theirs: as announced."""
    parties = worker.concurrency
    announced = worker.probe()[0]["max_connections"]
    ids = [worker.send("nested_at_once", key, parties) for _ in range(parties)]
    open_at_once = worker.while_all_wait(f"{key}-nested", parties + 1, lambda: database.connections(worker.name))
    outcomes = [worker.wait(task_id) for task_id in ids]
    assert [outcome.value for outcome in outcomes] == ["own connection"] * parties, outcomes
    assert 2 * parties <= len(open_at_once) <= announced


def test_units_of_work_in_turn_inside_a_task(worker: Worker, key: str, database: Database) -> None:
    assert worker.call("nested_thrice", key).value == [True]
    assert sorted(database.rows(key)) == ["task", "turn 0", "turn 1", "turn 2"]
