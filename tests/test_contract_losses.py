"""Work is never lost without a word: Sessions that are closed, results that cannot be encoded, listeners that fail."""

import pytest
from support.databases import Database
from support.waiting import eventually
from support.worker import Worker


@pytest.mark.def_only("close_by_remove")  # an AsyncSession has no such method
@pytest.mark.parametrize("how", ["close_in_finally", "close_with_a_block", "close_by_remove", "close_and_go_on"])
def test_a_session_that_is_closed_with_work_in_it_fails_the_task(
    worker: Worker, key: str, database: Database, how: str
) -> None:
    outcome = worker.call(how, key)
    assert outcome.error == "SessionClosedEarly"
    assert "losing.py" in outcome.message
    assert f"in {how}" in outcome.message
    assert "Leave the close out" in outcome.message
    assert database.rows(key) == []


def test_a_close_that_loses_nothing_is_allowed(worker: Worker, key: str, database: Database) -> None:
    assert worker.call("close_after_commit", key).state == "SUCCESS"
    assert database.rows(key) == ["first", "second"]
    assert worker.call("plain_task_that_closes", f"{key}-plain").state == "SUCCESS"


def test_a_block_whose_session_is_closed_fails(worker: Worker, key: str, database: Database) -> None:
    assert worker.call("close_in_a_block_inside", key).error == "SessionClosedEarly"
    assert database.rows(key) == []


def test_a_result_that_cannot_be_encoded_is_refused_before_the_commit(
    worker: Worker, key: str, database: Database
) -> None:
    outcome = worker.call("return_model", key)
    assert outcome.error == "UnencodableResult"
    assert "a Row at ['rows'][0] of its result" in outcome.message
    assert "primary key" in outcome.message
    assert database.rows(key) == []


def test_a_result_that_goes_to_the_next_task_must_be_encoded_too(worker: Worker, key: str, database: Database) -> None:
    ids = worker.send_chain(worker.signature("return_model_to_nobody", key), worker.signature("read", key))
    assert worker.wait(ids[0]).error == "UnencodableResult"
    assert database.rows(key) == []


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("name", ["after_commit", "after_transaction_end"])
def test_a_listener_that_fails_after_the_commit_undoes_nothing(
    worker: Worker, key: str, database: Database, name: str, by_hand: bool
) -> None:
    outcome = worker.call("listener_fails", key, name, by_hand)
    assert (outcome.state, outcome.value) == ("SUCCESS", "returned")
    assert len(database.rows(key)) == 1
    assert worker.said(key) == ["callback"]
    assert "] is committed; after that a listener failed" in worker.log()


def test_autocommit_that_one_task_leaves_reaches_no_other(worker: Worker, key: str, database: Database) -> None:
    def is_told() -> bool:
        """Of a connection that is new there is no warning: a listener may have set it up. So it is used before.

        All again until it is told: on a busy machine some process may get none of the tasks.
        """
        # By the Engine of ordinary tasks: `async def` ones have another.
        used = worker.call_together("plain_task_that_closes", [(f"{key}-used",)] * worker.concurrency)
        assert {outcome.state for outcome in used} == {"SUCCESS"}
        for _ in range(worker.concurrency):
            assert worker.call("leave_autocommit").state == "SUCCESS"
        outcomes = worker.call_together("fail", [(key,)] * worker.concurrency)
        assert {outcome.error for outcome in outcomes} == {"Boom"}
        return "autocommit from False to True" in worker.log()

    eventually(is_told, "it is told of")
    assert database.rows(key) == []
