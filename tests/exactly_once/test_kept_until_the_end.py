"""The outbox keeps a message until its receiver has ended: after the COMMIT the result is still to be stored, a chord
to count it, and what Celery sends to be sent. A process that dies there, with a message that the broker loses, loses
nothing."""

import os
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
from billiard.einfo import ExceptionInfo
from billiard.exceptions import WorkerLostError
from celery.exceptions import Ignore, Reject
from celery.worker import state
from celery.worker.request import Request
from kombu.utils.imports import symbol_by_name
from sqlalchemy import text
from support.exactly_once import BOTH_SPELLINGS, Place, done, fixture_of, new_id
from support.once_flows import OUTBOX, Flows
from support.project.models import Row
from support.waiting import eventually

from celery_alchemy.strategies.asynchronous import loop_thread
from celery_alchemy.strategies.asynchronous.strategy import PerLoopStrategy
from celery_alchemy.workers.exactly_once import choosing
from celery_alchemy.workers.sending import received


class Died(BaseException):
    """A process that ends here does nothing more."""


place = fixture_of(BOTH_SPELLINGS)


def dies(flows: Flows, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, message: Any) -> None:
    """Run `message` in a process that dies when it calls that."""

    def die(*_: Any, **__: Any) -> None:
        raise Died

    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(owner, name, die)
        flows.run(message)


@pytest.mark.parametrize("point", ["store_result", "on_chord_part_return", "mark_as_done"])
def test_what_died_after_its_commit_is_sent_again(
    flows: Flows, key: str, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chord = {"chord": flows.step.s([], key, "body"), "group_id": new_id()} if point == "on_chord_part_return" else {}
    flows.by_outbox(flows.step.s(None, key, "a").set(**chord))
    flows.send()
    (message,) = flows.taken()
    dies(flows, monkeypatch, type(flows.app.backend), point, message)
    assert flows.traces(key) == ["None>a"]
    flows.sweep()
    flows.later()
    assert flows.send() == 1
    (copy,) = flows.taken()
    stored = []
    monkeypatch.setattr(type(flows.app.backend), "mark_as_done", lambda *_, **__: stored.append("done"))
    assert flows.run(copy)[0] == "SUCCESS"
    assert stored == ["done"]
    assert flows.traces(key) == ["None>a"]
    flows.sweep()
    assert flows.outbox() == []


def test_the_pause_grows_no_longer_than_half_of_what_is_remembered(place: Place, key: str) -> None:
    """Without the row of its receiver, which is pruned, a message that is sent again would run again."""
    settings = {**place[1], "alchemy_outbox_resend_s": 1000, "alchemy_completed_kept_s": 10_000}
    flows, pauses_s = Flows(place[0], **settings), []
    try:
        flows.by_outbox(flows.step.s(None, key, "a"))
        for _ in range(8):
            before = time.time()
            assert flows.send() == 1
            (due_at,) = place[0].column(f"SELECT due_at FROM {OUTBOX}")
            pauses_s.append(round((due_at - before) / 1000))
            flows.later()
    finally:
        flows.close()
    assert pauses_s == [1, 2, 4, 5, 5, 5, 5, 5]


def test_what_celery_sends_after_the_commit(flows: Flows, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class with a `__call__` of its own leaves its links to Celery."""

    class Calling(flows.base):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    @flows.task(name="calling", base=Calling)
    async def calling(self: Any) -> str:
        self.db.add(Row(key=key, note="calling"))
        await done(self.db.flush())
        return "called"

    flows.by_outbox(calling.s().set(link=flows.step.s(key, "link")))
    flows.send()
    (message,) = flows.taken()
    dies(flows, monkeypatch, type(flows.app.amqp), "_retry_publish", message)
    flows.sweep()
    flows.later()
    flows.work(copies=2)
    assert flows.traces(key) == ["called>link", "calling"]
    flows.sweep()
    assert flows.outbox() == []


def test_a_receiver_that_never_tells_is_asked_a_bounded_number_of_times(
    place: Any, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has completed: so nothing is set aside in the end."""
    flows = Flows(place[0], **place[1], alchemy_outbox_attempts=3)
    try:
        monkeypatch.setattr(received.Received, "add", lambda *_: None)
        flows.by_outbox(flows.step, None, key, "a")
        sent = []
        for _ in range(5):
            sent.append(flows.send())
            for message in flows.taken():
                flows.run(message)
            flows.later()
        assert sent == [1, 1, 1, 0, 0]
        assert flows.outbox() == []
        assert flows.traces(key) == ["None>a"]
    finally:
        flows.close()


def test_it_is_deleted_beside_the_tasks(flows: Flows, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(received, "PAUSE_S", 0.1)
    for name in "abc":
        flows.by_outbox(flows.step, None, key, name)
    flows.work()
    until = time.monotonic() + 60
    while flows.outbox() and time.monotonic() < until:
        time.sleep(0.05)
    assert flows.outbox() == []


def test_it_is_deleted_when_the_worker_ends(flows: Flows, key: str) -> None:
    flows.by_outbox(flows.step, None, key, "a")
    flows.work()
    assert len(flows.outbox()) == 1
    flows.db.stop()
    assert flows.outbox() == []


def test_what_the_end_of_the_event_loop_interrupts_is_deleted_after_that(flows: Flows, key: str) -> None:
    """With a driver for asyncio alone it is deleted on that event loop, which the worker's end stops first."""
    flows.by_outbox(flows.step, None, key, "a")
    flows.work()
    if not isinstance(flows.db.strategy, PerLoopStrategy):
        pytest.skip("it is deleted without an event loop")
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    if flows.database.engine.dialect.name != "postgresql":
        waiting = (
            "SELECT count(*) FROM information_schema.innodb_trx JOIN information_schema.processlist "
            "ON id = trx_mysql_thread_id WHERE db = database() AND trx_state = 'LOCK WAIT'"
        )
    engine = flows.database.engine.execution_options(isolation_level="READ COMMITTED")
    with engine.begin() as other:
        other.execute(text(f"SELECT 1 FROM {OUTBOX} FOR UPDATE"))
        thread = threading.Thread(target=flows.sweep)
        thread.start()
        eventually(lambda: flows.database.column(waiting) == [1], "it waits for the row")
        loop_thread.stop()
        thread.join(60)
    assert len(flows.outbox()) == 1
    flows.sweep()
    assert flows.outbox() == []


def test_only_the_row_of_the_very_id(flows: Flows, key: str) -> None:
    """Databases may take "a" and "A" for the same."""
    ids = [f"a-{key}", f"A-{key}"]
    for task_id in ids:
        flows.deliver(flows.step, None, key, task_id[0], task_id=new_id(), callbacks=[_link(flows, key, task_id)])
    assert sorted(row[1] for row in flows.outbox()) == sorted(ids)
    flows.send()
    first, second = sorted(flows.taken(), key=lambda message: message.headers["id"])
    flows.run(first)
    flows.sweep()
    assert [row[1] for row in flows.outbox()] == [second.headers["id"]]
    flows.run(second)
    flows.sweep()
    assert flows.outbox() == []


def _link(flows: Flows, key: str, task_id: str) -> dict[str, Any]:
    return dict(flows.step.s(key, "link").set(task_id=task_id))


@pytest.mark.parametrize("task_id", ["long" * 64, "a space at the end "])
def test_an_id_that_is_recorded_as_another_is_kept_too(flows: Flows, key: str, task_id: str) -> None:
    """Lost by the broker, it is sent again; received, its row is found."""
    flows.by_outbox(flows.step.s(None, key, "a").set(task_id=f"{key}{task_id}"))
    assert flows.send() == 1
    assert len(flows.taken()) == 1  # and is lost
    assert len(flows.outbox()) == 1
    flows.later()
    assert flows.send() == 1
    (message,) = flows.taken()
    assert flows.run(message) == ("SUCCESS", "a")
    flows.sweep()
    assert flows.outbox() == []
    assert flows.traces(key) == ["None>a"]


def test_replaced_and_delivered_again(flows: Flows, key: str) -> None:
    @flows.task(name="before")
    async def before(self: Any) -> None:
        self.db.add(Row(key=key, note="before"))
        await done(self.db.flush())
        raise self.replace(flows.step.s(None, key, "after"))

    flows.by_outbox(before)
    flows.work(copies=2)
    flows.sweep()
    assert flows.outbox() == []
    assert flows.traces(key) == ["None>after", "before"]


def test_a_forked_process_has_its_own(flows: Flows, key: str) -> None:
    flows.by_outbox(flows.step, None, key, "a")
    flows.work()
    flows.send()
    found = received.received(flows.db)
    child = os.fork()
    if child == 0:
        os._exit(received.received(flows.db) is not found and found.drop() is None)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert len(flows.outbox()) == 1
    flows.sweep()
    assert flows.outbox() == []


@pytest.mark.parametrize("ends", ["hard time limit", "revoked", "expired", "worker lost"])
def test_what_the_main_process_ends_is_not_sent_again(flows: Flows, key: str, ends: str) -> None:
    """But a task whose pool process was lost is."""
    choosing.prepare_worker(flows.app, flows.db.settings)
    flows.by_outbox(flows.step.s(None, key, "a"))
    flows.send()
    (message,) = flows.taken()
    request = Request(message, app=flows.app, task=flows.step, hostname="here")
    if ends == "hard time limit":
        request.on_timeout(False, 1.0)
    elif ends == "worker lost":
        try:
            raise WorkerLostError("killed")
        except WorkerLostError:
            request.on_failure(ExceptionInfo())
    elif ends == "revoked":
        state.revoked.add(request.id)
        assert request.revoked()
    else:
        request.expires = flows.app.now() - timedelta(seconds=1)
        assert request.revoked()
    flows.later()
    assert flows.send() == (1 if ends == "worker lost" else 0)
    assert len(flows.outbox()) == (1 if ends == "worker lost" else 0)


@pytest.mark.parametrize("error", [Ignore, Reject])
@pytest.mark.parametrize("where", ["before_start", "__call__, before run", "__call__, after run"])
def test_what_is_ended_outside_its_body_is_not_sent_again(flows: Flows, key: str, where: str, error: Any) -> None:
    class Ending(flows.base):
        def before_start(self, *_: Any) -> None:
            if where == "before_start":
                raise error

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if where == "__call__, after run":
                super().__call__(*args, **kwargs)
            raise error

    @flows.task(name="ending", base=Ending)
    async def ending(self: Any) -> None:
        self.db.add(Row(key=key))
        await done(self.db.flush())

    flows.by_outbox(ending.s())
    flows.send()
    (message,) = flows.taken()
    assert flows.run(message)[0] == ("IGNORED" if error is Ignore else "REJECTED")
    flows.sweep()
    assert flows.outbox() == []


def test_a_message_that_goes_back_is_kept(flows: Flows) -> None:
    class Waiting(flows.base):
        def before_start(self, *_: Any) -> None:
            raise Reject(requeue=True)

    @flows.task(name="waiting", base=Waiting)
    async def waiting(self: Any) -> None: ...

    flows.by_outbox(waiting.s())
    flows.send()
    (message,) = flows.taken()
    assert flows.run(message)[0] == "REJECTED"
    flows.sweep()
    assert len(flows.outbox()) == 1


@pytest.mark.parametrize("ends", ["hard time limit", "worker lost"])
def test_errbacks_of_the_main_process_have_the_ids_of_its_pool_process(flows: Flows, key: str, ends: str) -> None:
    """A copy of the request may fail too, and its errbacks are known then."""
    choosing.prepare_worker(flows.app, flows.db.settings)

    @flows.task(name="fails")
    async def fails(self: Any) -> None:
        raise KeyError(key)

    fails.s().on_error(flows.step.si(None, key, "errback")).apply_async()
    (message,) = flows.taken()
    for _ in range(2):  # it is not acknowledged yet, and delivered again
        request = symbol_by_name(choosing.REQUEST)(message, app=flows.app, task=fails, hostname="here")
        if ends == "hard time limit":
            request.on_timeout(False, 1.0)
        else:
            try:
                raise WorkerLostError("killed")
            except WorkerLostError:
                request.on_failure(ExceptionInfo())
    flows.run(message)
    flows.work()
    assert flows.traces(key) == ["None>errback"]
