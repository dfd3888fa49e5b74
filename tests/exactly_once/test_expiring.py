"""Messages with `expires` that are delivered again after that."""

import json
import threading
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import states
from celery.result import AsyncResult
from support.databases import PostgreSQL
from support.exactly_once import Once, new_id
from support.project.models import Row
from support.waiting import eventually
from support.worker import Site, Worker, running

from celery_alchemy import DatabaseTask

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


def test_a_worker_revokes_no_message_of_a_task_that_runs(site: Site, run_database: PostgreSQL, key: str) -> None:
    """It was revoked: the result was REVOKED while the task ran, and a chord would have failed."""
    name = f"{site.prefix[:-1]}-expiring-{uuid.uuid4().hex[:6]}"
    worker = Worker(site, name, "prefork", run_database.url(name), modules=("endings", "once"))
    with running(worker):
        task_id = worker.send("once_meeting", key, 2, expires=600)
        eventually(lambda: site.redis.get(site.key("barrier", key)), "it runs")
        deliver_again(site, worker, task_id)
        revoked = f"Discarding revoked task: once_meeting[{task_id}]"
        # The copy waits, and says nothing of that until the first one has ended.
        eventually(lambda: worker.log().count(f"Task once_meeting[{task_id}] received") == 2, "it is delivered again")
        worker.while_all_wait(key, 2, lambda: None)
        records = site.key("task", task_id)
        eventually(lambda: revoked in worker.log() or site.redis.llen(records) >= 4, "both have ended")
        ended = [json.loads(one) for one in site.redis.lrange(records, 0, -1)]
        assert [one["value"] for one in ended if one.get("state") == states.SUCCESS] == ["done"] * 2
        assert revoked not in worker.log()
    assert run_database.rows(key) == ["once_meeting"]


def deliver_again(site: Site, worker: Worker, task_id: str) -> None:
    """Do what kombu does with a message after the visibility timeout, when that was longer than `expires`."""
    found = [json.loads(one)[0] for one in site.redis.hvals(f"{site.prefix}unacked")]
    (message,) = [one for one in found if one["headers"]["id"] == task_id]
    message["headers"] |= {"redelivered": True, "expires": EXPIRED["expires"]}
    message["properties"]["delivery_info"]["redelivered"] = True
    message["properties"]["delivery_tag"] = uuid.uuid4().hex
    site.redis.lpush(f"{site.prefix}{worker.queue}", json.dumps(message))
