"""What comes after a task goes into the transaction of its work: chains, links, groups, chords, replacements, and what
the body sends. With copies of every message, and with messages that the broker loses."""

import asyncio
import threading
from typing import Any

import pytest
from celery import chain, group
from celery.exceptions import Ignore, Reject
from support.exactly_once import BOTH_SPELLINGS, done, fixture_of, new_id
from support.once_flows import OUTBOX, Flows
from support.project.models import Row

from celery_alchemy.strategies.place import current_coroutine

place = fixture_of(BOTH_SPELLINGS)


async def waited(event: threading.Event) -> None:
    """Wait for `event`; in a coroutine, in another thread."""
    in_coroutine = current_coroutine() is not None
    await done(asyncio.to_thread(event.wait, 20) if in_coroutine else event.wait(20))


def canvases(flows: Flows, key: str) -> dict[str, Any]:
    step = flows.step
    return {
        "chain": (
            chain(step.s(None, key, "a"), step.s(key, "b"), step.s(key, "c")),
            ["None>a", "a>b", "b>c"],
        ),
        "links": (
            step.s(None, key, "a").set(link=[step.s(key, "l"), step.s(key, "m")]),
            ["None>a", "a>l", "a>m"],
        ),
        "a group": (
            chain(step.s(None, key, "a"), group(step.s(key, "g"), step.s(key, "h"))),
            ["None>a", "a>g", "a>h"],
        ),
        "a linked group": (
            step.s(None, key, "a").set(link=[group(step.s(key, "g"), step.s(key, "h")), step.s(key, "l")]),
            ["None>a", "a>g", "a>h", "a>l"],
        ),
        "a chain with a link": (
            chain(step.s(None, key, "a").set(link=[step.s(key, "l")]), step.s(key, "b")),
            ["None>a", "a>b", "a>l"],
        ),
    }


KINDS = ["chain", "links", "a group", "a linked group", "a chain with a link"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_canvas_has_each_effect_once(flows: Flows, key: str, kind: str) -> None:
    canvas, traces = canvases(flows, key)[kind]
    canvas.apply_async()
    flows.work(copies=3)
    assert flows.traces(key) == sorted(traces)
    assert len(flows.bodies) == len(traces)
    flows.sweep()
    assert flows.outbox() == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_broker_loses_is_sent_again(flows: Flows, key: str, kind: str) -> None:
    """Each message that comes from the outbox is lost once."""
    canvas, traces = canvases(flows, key)[kind]
    canvas.apply_async()
    (first,) = flows.taken()
    flows.run(first)
    lost = set()

    def loses(message: Any) -> bool:
        new = message.headers["id"] not in lost
        lost.add(message.headers["id"])
        return new

    for _ in range(2 * len(traces)):
        flows.work(loses=loses)
        flows.later()
    assert flows.traces(key) == sorted(traces)
    assert len(lost) == len(traces) - 1
    flows.sweep()
    assert flows.outbox() == []


def test_it_is_written_by_the_transaction_of_the_work(flows: Flows, key: str) -> None:
    """Before the tracer has stored the result, and not at all where the work is rolled back."""
    found = []

    @flows.task(name="work")
    async def work(self: Any) -> str:
        self.db.add(Row(key=key))
        await done(self.db.flush())
        flows.step.delay_on_commit(None, key, "sent")
        found.append(flows.outbox())
        return "done"

    @flows.task(name="fails")
    async def fails(self: Any) -> str:
        flows.step.delay(None, key, "sent")
        raise ValueError("no")

    link = dict(flows.step.s(key, "link"))
    assert flows.deliver(work, task_id=new_id(), callbacks=[link])[0] == "SUCCESS"
    assert found == [[]]
    assert [row[0] for row in flows.outbox()] == ["step", "step"]
    assert len(set(flows.database.column(f"SELECT batch FROM {OUTBOX}"))) == 1, "of one transaction"
    assert flows.deliver(fails, task_id=new_id(), callbacks=[link])[0] == "FAILURE"
    assert len(flows.outbox()) == 2


def test_a_copy_sends_nothing(flows: Flows, key: str) -> None:
    task_id, link = new_id(), dict(flows.step.s(key, "link"))
    for _ in range(3):
        assert flows.deliver(flows.step, None, key, "a", task_id=task_id, callbacks=[dict(link)]) == ("SUCCESS", "a")
    assert len(flows.outbox()) == 1
    assert flows.send() == 1
    assert len(flows.taken()) == 1


def test_what_the_outbox_could_not_have_is_sent_by_the_tracer(flows: Flows, key: str) -> None:
    """A task whose class has a `__call__` of its own: it may change the result."""

    class Own(flows.base):  # type: ignore[misc, name-defined]
        abstract = True

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return f"own {super().__call__(*args, **kwargs)}"

    @flows.task(base=Own, name="work")
    async def work(self: Any) -> str:
        self.db.add(Row(key=key))
        return "done"

    task_id = new_id()
    for _ in range(2):
        link = dict(flows.step.s(key, "link"))
        assert flows.deliver(work, task_id=task_id, callbacks=[link]) == ("SUCCESS", "own done")
    flows.work()
    assert flows.traces(key) == ["", "own done>link"]


@pytest.mark.parametrize("what", ["task", "group", "chain"])
def test_a_replacement_goes_with_the_commit(flows: Flows, key: str, what: str) -> None:
    step = flows.step

    @flows.task(name="replaced")
    async def replaced(self: Any) -> Any:
        flows.bodies.append("replaced")
        self.db.add(Row(key=key, note="r"))
        by = {
            "task": step.s("r", key, "one"),
            "group": group(step.s("r", key, "g"), step.s("r", key, "h")),
            "chain": chain(step.s("r", key, "one"), step.s(key, "two")),
        }
        return self.replace(by[what])

    task_id = new_id()
    for _ in range(3):
        assert flows.deliver(replaced, task_id=task_id, root_id=task_id)[0] == "IGNORED"
    flows.work(copies=2)
    ends = {"task": ["r>one"], "group": ["r>g", "r>h"], "chain": ["one>two", "r>one"]}
    assert flows.traces(key) == sorted(["r", *ends[what]])
    assert flows.bodies.count("replaced") == 1


def test_delay_in_the_body_waits_for_the_commit(flows: Flows, key: str) -> None:
    ends: list[Any] = [ValueError("no"), None]

    @flows.task(name="work", autoretry_for=(ValueError,), max_retries=3)
    async def work(self: Any) -> str:
        self.db.add(Row(key=key, note="work"))
        await done(self.db.flush())
        flows.step.delay(None, key, "sent")
        flows.step.apply_async((None, key, "chosen"), task_id=f"chosen-{key}")
        error = ends.pop(0) if ends else None
        if error is not None:
            raise error
        return "done"

    task_id = new_id()
    work.apply_async(task_id=task_id, countdown=0)
    flows.work(copies=2)
    assert flows.traces(key) == ["None>chosen", "None>sent", "work"]
    assert len(flows.recorded(f"chosen-{key}")) == 1


def test_what_is_sent_at_once_has_the_same_id_each_time(flows: Flows, key: str) -> None:
    """Its place is the task, its arguments, and how many of these came before: not the order of others."""
    orders = [["a", "b", "a"], ["b", "a", "a"], ["c", "a"]]

    @flows.task(name="work")
    async def work(self: Any) -> str:
        await done(self.db.flush())
        for note in orders[self.request.delivery_info["number"]]:
            flows.step.apply_async((None, key, note), enqueue_on_commit=False)
        raise ValueError("no")

    task_id, sent = new_id(), []
    for number in range(3):
        info = {"priority": None, "number": number}
        assert flows.deliver(work, task_id=task_id, delivery_info=info)[0] == "FAILURE"
        sent.append([(message.decode()[0][2], message.headers["id"]) for message in flows.taken()])
    assert sorted(sent[0]) == sorted(sent[1])
    assert len({one for _, one in sent[0]}) == 3
    new, known = sent[2]
    assert known in sent[0]
    assert new not in sent[0]


def test_a_request_that_has_failed_is_not_sent_again(flows: Flows, key: str) -> None:
    ends: list[Any] = [ValueError("no"), Ignore(), Reject("no", requeue=False)]

    @flows.task(name="fails")
    async def fails(self: Any) -> str:
        self.db.add(Row(key=key))
        await done(self.db.flush())
        raise ends.pop(0)

    for _ in range(3):
        flows.by_outbox(fails)
        flows.send()
        assert [row[3] for row in flows.outbox()] == [1]
        (message,) = flows.taken()
        flows.run(message)
        assert flows.outbox() == []


def test_a_message_whose_receiver_never_completes_is_set_aside(place: Any, key: str) -> None:
    """So the copies are bounded; the pause doubles from one to the next."""
    flows = Flows(place[0], **place[1], alchemy_outbox_attempts=3)
    try:
        flows.by_outbox(flows.step, None, key, "lost")
        pauses = []
        for _ in range(6):
            flows.send()
            pauses += [
                one and round(float(one) / 1000)
                for one in flows.database.column(f"SELECT due_at - created_at FROM {OUTBOX}")
            ]
            flows.later()
        assert pauses == [1, 2, 4, None, None, None]
        assert len(flows.taken()) == 4
        (error,) = flows.database.column(f"SELECT error FROM {OUTBOX}")
        assert error == "sent 4 times, and its receiver has recorded nothing"
    finally:
        flows.close()


def test_a_receiver_without_it_gets_its_message_once(flows: Flows, key: str) -> None:
    @flows.app.task(name="plain", shared=False)
    def plain(got: Any) -> None:
        flows.bodies.append("plain")

    flows.deliver(flows.step, None, key, "a", task_id=new_id(), callbacks=[dict(plain.s())])
    assert [row[2] for row in flows.outbox()] == [None]
    flows.send()
    assert flows.outbox() == []


def test_a_receiver_that_runs_gets_no_copy(flows: Flows, key: str) -> None:
    """However long it takes: its transaction has its row in hand."""
    entered, leave = threading.Event(), threading.Event()

    @flows.task(name="long")
    async def long(self: Any) -> str:
        self.db.add(Row(key=key, note="long"))
        await done(self.db.flush())
        entered.set()
        await waited(leave)
        return "done"

    flows.by_outbox(long)
    flows.send()
    (message,) = flows.taken()
    thread = threading.Thread(target=flows.run, args=(message,))
    thread.start()
    try:
        assert entered.wait(20)
        for _ in range(3):
            flows.later()
            assert flows.send() == 0
    finally:
        leave.set()
        thread.join(20)
    flows.sweep()
    flows.later()
    assert flows.send() == 0
    assert flows.outbox() == []
    assert flows.traces(key) == ["long"]


def test_it_is_safe_to_send_again(flows: Flows, key: str) -> None:
    """All messages of a canvas, at any time, by any sender: from before the first has run to after the last has."""
    canvas, traces = canvases(flows, key)["a group"]
    canvas.apply_async()
    seen = flows.taken()
    for message in seen:
        flows.run(message)
    for _ in range(6):
        flows.send()
        new = flows.taken()
        for message in [*seen, *new, *reversed(seen)]:
            flows.run(message)
        seen += new
    assert flows.traces(key) == sorted(traces)
    assert len(seen) == len(traces)


def test_what_a_copy_sends_after_its_end_is_in_the_outbox(
    flows: Flows, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member of a chord is killed before it is counted. Its copy sends the chord's body: a broker may lose that."""
    body, backend = flows.step.s([], key, "body").set(task_id=new_id()), type(flows.app.backend)
    flows.step.s(None, key, "member").apply_async()
    (member,) = flows.taken()
    flows.run(member)
    # As Celery's backends do, which count the parts of a chord there.
    monkeypatch.setattr(backend, "mark_as_done", lambda *_, **__: body.delay(), raising=True)
    flows.run(member, redelivered=True)
    monkeypatch.undo()
    assert flows.bodies == ["member"]
    assert flows.taken() == []
    assert [(task_id, sends) for _, task_id, _, sends in flows.outbox()] == [(body.id, 0)]
    assert flows.send() == 1
    flows.later()
    assert flows.send() == 1  # once more, for nothing has received it
    flows.work()
    assert flows.traces(key) == [">body", "None>member"]
