"""Tasks under `--pool=asyncio`: real workers, Redis and RabbitMQ."""

from collections.abc import Iterator

import pytest
from support import servers
from support.databases import PostgreSQL
from support.worker import Site, Worker, running

MODULES = ("coroutines",)


@pytest.fixture(scope="module", params=["redis", "rabbitmq"])
def coroutines(request: pytest.FixtureRequest, site: Site, run_database: PostgreSQL) -> Iterator[Worker]:
    name = f"{site.prefix[:-1]}-asyncio-{request.param}"
    broker_url = servers.rabbitmq() if request.param == "rabbitmq" else ""
    url = run_database.url(name)
    with running(
        Worker(site, name, "asyncio", database_url=url, concurrency=50, broker_url=broker_url, modules=MODULES)
    ) as worker:
        yield worker


def test_coroutines_are_awaited_and_functions_are_called(coroutines: Worker) -> None:
    assert [coroutines.call(task, 2, 3).value for task in ("add", "add_in_thread")] == [5, 5]
    failed = coroutines.call("fail", "so it is")
    assert (failed.state, failed.error, failed.message) == ("FAILURE", "ValueError", "so it is")


def test_a_task_retries(coroutines: Worker) -> None:
    assert coroutines.call("retried").value == 2
    assert coroutines.call("retried_by_itself").value == 2


def test_no_task_sees_the_request_or_the_context_of_another(coroutines: Worker) -> None:
    calls = [(f"request {number}",) for number in range(200)]
    outcomes = coroutines.call_together("same_request", calls)
    outcomes += coroutines.call_together("same_request_in_thread", calls[:50])
    assert [outcome for outcome in outcomes if outcome.state != "SUCCESS" or outcome.value] == []


def test_as_many_threads_as_tasks_want(coroutines: Worker, key: str) -> None:
    outcomes = coroutines.call_together("meet_in_threads", [(key, 40)] * 40)
    assert {outcome.value for outcome in outcomes} == {"met"}


def test_a_chain_and_many_messages_from_a_coroutine(coroutines: Worker) -> None:
    assert coroutines.call("send", 30).value == 30
    first, second = coroutines.send_chain(
        coroutines.signature("add", 1, 2), coroutines.signature("add", 10, immutable=False)
    )
    assert (coroutines.wait(first).value, coroutines.wait(second).value) == (3, 13)


@pytest.mark.parametrize("task", ["sleep", "in_group"])
def test_a_soft_limit_is_raised_at_the_await(coroutines: Worker, task: str, key: str) -> None:
    arguments = (key, 30) if task == "sleep" else ()
    outcome = coroutines.call(task, *arguments, soft_time_limit=0.3)
    assert (outcome.state, outcome.error) == ("FAILURE", "SoftTimeLimitExceeded")
    if arguments:
        assert [said["note"] for said in coroutines.said(key)] == ["begun", "soft limit"]


def test_a_task_catches_its_soft_limit(coroutines: Worker, key: str) -> None:
    assert coroutines.call("catch_limit", key, soft_time_limit=0.3).value == "caught"


def test_a_hard_limit_ends_the_task(coroutines: Worker, key: str) -> None:
    outcome = coroutines.call("sleep", key, 30, time_limit=0.3)
    assert (outcome.state, outcome.error) == ("FAILURE", "TimeLimitExceeded")
    assert [said["note"] for said in coroutines.said(key)] == ["begun", "cancelled"]


def test_a_swallowed_hard_limit_is_repeated(coroutines: Worker, key: str) -> None:
    outcome = coroutines.call("swallow", key, 2.5, time_limit=0.3)
    assert outcome.error == "TimeLimitExceeded"
    assert coroutines.call("add", 1, 1).value == 2
    notes: list[str] = []
    while len(notes) < 2:
        notes += [said["note"] for said in coroutines.said(key)]
    assert notes == ["begun", "hit 2"]


def test_what_would_end_a_process_ends_a_task(coroutines: Worker) -> None:
    assert coroutines.call("exit_child").value == "alive"
    assert coroutines.call("cancel_itself").state == "FAILURE"
    assert coroutines.call("add", 1, 1).value == 2


def test_inspect_and_resizing(coroutines: Worker, key: str) -> None:
    task_id = coroutines.send("sleep", key, 5)
    while not coroutines.said(key):
        pass
    assert [one["id"] for one in coroutines.inspect("active")] == [task_id]
    pool = coroutines.inspect("stats")["pool"]
    assert (pool["max-concurrency"], pool["running"]) == (50, 1)
    coroutines.inspect("pool_grow", n=2)
    coroutines.inspect("pool_shrink", n=1)
    assert coroutines.inspect("stats")["pool"]["max-concurrency"] == 51
    coroutines.control("revoke", task_id=task_id, terminate=True)
    assert coroutines.wait(task_id, ended="NONE").state == "NONE"
