"""Messages that are delivered again after they have expired, or were revoked."""

import json
import threading
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import states
from celery.result import AsyncResult
from celery.worker import state
from celery.worker.request import Request
from kombu.utils.imports import symbol_by_name
from support.databases import PostgreSQL
from support.exactly_once import Once, new_id
from support.once_flows import Flows
from support.project.models import Row
from support.waiting import eventually
from support.worker import Site, Worker, running

from celery_alchemy import DatabaseTask
from celery_alchemy.workers.exactly_once import choosing

EXPIRED = {"expires": (datetime.now(UTC) - timedelta(minutes=1)).isoformat(), "redelivered": True}


def test_what_has_completed_or_runs_does_not_expire(once: Once, key: str) -> None:
    entered, leave = threading.Event(), threading.Event()

    @once.app.task(base=DatabaseTask, bind=True, exactly_once=True)
    def work(self: Any) -> str:
        self.db.add(Row(key=key))
        self.db.flush()
        entered.set()
        leave.wait(20)
        return "done"

    once.app.finalize()
    task, task_id, found = once.app.tasks[work.name], new_id(), []
    threads = [threading.Thread(target=lambda: found.append(once.deliver(task, task_id=task_id)))]
    threads[0].start()
    assert entered.wait(20)
    threads.append(threading.Thread(target=lambda: found.append(once.deliver(task, task_id=task_id, **EXPIRED))))
    threads[1].start()
    threads[1].join(0.5)
    leave.set()
    for thread in threads:
        thread.join(20)
    assert found == [("SUCCESS", "done")] * 2
    assert once.deliver(task, task_id=task_id, **EXPIRED) == ("SUCCESS", "done")
    assert once.database.rows(key) == [""]


@pytest.mark.parametrize("is_ignored", [False, True])
def test_what_neither_runs_nor_has_completed_is_revoked(once: Once, key: str, is_ignored: bool) -> None:
    @once.app.task(base=DatabaseTask, bind=True, exactly_once=True, ignore_result=is_ignored)
    def work(self: Any) -> None:
        self.db.add(Row(key=key))

    task_id = new_id()
    assert once.deliver(work, task_id=task_id, **EXPIRED)[0] == "IGNORED"
    assert once.database.rows(key) == []
    expected = states.PENDING if is_ignored else states.REVOKED
    assert AsyncResult(task_id, app=once.app).state == expected
    # One that was taken in time may begin a little later.
    assert once.deliver(work, task_id=task_id, expires=EXPIRED["expires"]) == ("SUCCESS", None)


REVOKING: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "expires": ({"expires": 600}, {"expires": EXPIRED["expires"]}, {}),
    "by id": ({}, {}, {"command": "revoke"}),
    "by stamp": (
        {"stamped_headers": ["tenant"], "tenant": "acme"},
        {},
        {"command": "revoke_by_stamped_headers", "headers": {"tenant": ["acme"]}},
    ),
}
"""How the message is sent, how it is changed when it comes again, and what the worker is told before that."""


@pytest.mark.parametrize("how", REVOKING)
def test_a_worker_revokes_no_message_of_a_task_that_runs_or_has_completed(
    site: Site, run_database: PostgreSQL, key: str, how: str
) -> None:
    """It was revoked: the result was REVOKED while the task ran, and where it was not stored yet when its worker was
    lost. A chord would have failed."""
    options, changed, command = REVOKING[how]
    name = f"{site.prefix[:-1]}-discarded-{uuid.uuid4().hex[:6]}"
    worker = Worker(site, name, "prefork", run_database.url(name), modules=("endings", "once"))
    with running(worker):
        task_id = worker.send("once_meeting", key, 2, **options)
        eventually(lambda: site.redis.get(site.key("barrier", key)), "it runs")
        if command:
            by_id = {"task_id": task_id} if command["command"] == "revoke" else {}
            worker.control(**command, **by_id)
            worker.inspect("ping")  # it has taken the command before
        message = deliver_again(site, worker, message_of(site, task_id), **changed)
        revoked = f"Discarding revoked task: once_meeting[{task_id}]"
        # The copy waits, and says nothing of that until the first one has ended.
        eventually(lambda: worker.log().count(f"Task once_meeting[{task_id}] received") == 2, "it is delivered again")
        worker.while_all_wait(key, 2, lambda: None)
        records = site.key("task", task_id)
        eventually(lambda: revoked in worker.log() or site.redis.llen(records) >= 4, "both have ended")
        assert revoked not in worker.log()
        result = f"{site.prefix}celery-task-meta-{task_id}"
        site.redis.delete(result)  # as if the worker had been killed after the COMMIT
        deliver_again(site, worker, message, **changed)
        eventually(lambda: site.redis.get(result), "it has ended once more")
        eventually(lambda: site.redis.llen(records) >= 6, "it has told so")
        ended = [json.loads(one) for one in site.redis.lrange(records, 0, -1)]
        assert [one["value"] for one in ended if one.get("state") == states.SUCCESS] == ["done"] * 3
        assert json.loads(site.redis.get(result))["status"] == states.SUCCESS
        assert revoked not in worker.log()
    assert run_database.rows(key) == ["once_meeting"]


def test_what_was_revoked_and_does_not_run_is_revoked(site: Site, run_database: PostgreSQL, key: str) -> None:
    name = f"{site.prefix[:-1]}-discarded-{uuid.uuid4().hex[:6]}"
    worker = Worker(site, name, "prefork", run_database.url(name), concurrency=1, modules=("endings", "once"))
    with running(worker):
        task_id = worker.send("once_meeting", key, 2)
        eventually(lambda: site.redis.get(site.key("barrier", key)), "it runs")
        message = message_of(site, task_id)
        worker.control("revoke", task_id=task_id, terminate=True)
        result = f"{site.prefix}celery-task-meta-{task_id}"
        eventually(lambda: site.redis.get(result), "it is terminated")
        site.redis.delete(result)
        deliver_again(site, worker, message)
        eventually(lambda: site.redis.get(result), "it has ended once more")
        assert json.loads(site.redis.get(result))["status"] == states.REVOKED
    assert run_database.rows(key) == []


@pytest.mark.parametrize("wish", [True, False])
@pytest.mark.parametrize("how", ["expires", "revoke", "its process is lost"])
def test_a_class_that_inherits_and_has_none_is_revoked_by_the_main_process(flows: Flows, how: str, wish: bool) -> None:
    """Its pool process would run it: nothing there looks for a row."""

    class Recorded(flows.base):
        exactly_once = True
        abstract = True

    @flows.task(name="work", base=Recorded, exactly_once=wish, acks_late=True, reject_on_worker_lost=True)
    async def work(self: Any) -> None: ...

    assert work.Request == choosing.REQUEST
    work.apply_async()
    (message,) = flows.taken()
    message.delivery_info["redelivered"] = True
    request = symbol_by_name(work.Request)(message, app=flows.app, task=work, hostname="here")
    if how == "expires":
        request.expires = flows.app.now() - timedelta(seconds=1)
    elif how == "revoke":
        state.revoked.add(request.id)
    else:
        if not hasattr(Request, "_success_was_stored"):
            pytest.skip("this version of Celery does not look for a result")
        flows.app.backend.mark_as_done(request.id, None)
        assert request._success_was_stored() is not wish  # and then its message is acknowledged
        return
    assert bool(request.revoked()) is not wish


def message_of(site: Site, task_id: str) -> dict[str, Any]:
    """Return the message that a worker has in hand."""
    found = [json.loads(one)[0] for one in site.redis.hvals(f"{site.prefix}unacked")]
    (message,) = [one for one in found if one["headers"]["id"] == task_id]
    return dict(message)


def deliver_again(site: Site, worker: Worker, message: dict[str, Any], **headers: Any) -> dict[str, Any]:
    """Do what kombu does with a message after the visibility timeout; return it."""
    message["headers"] |= {"redelivered": True, **headers}
    message["properties"]["delivery_info"]["redelivered"] = True
    message["properties"]["delivery_tag"] = uuid.uuid4().hex
    site.redis.lpush(f"{site.prefix}{worker.queue}", json.dumps(message))
    return message
