"""`result_backend = "alchemy://"` counts the members of a chord in the database: its body comes once."""

import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from celery import chain, chord, group, states
from celery._state import _set_task_join_will_block
from celery.result import AsyncResult, ResultSet
from support.databases import Database
from support.exactly_once import BOTH_SPELLINGS, Place, fixture_of, together
from support.once_flows import COMPLETED, Flows, RolledBack
from support.project.models import Row

from celery_alchemy.workers.exactly_once import own_chords

MEMBERS = 4


place = fixture_of(BOTH_SPELLINGS)


@pytest.fixture(params=["outbox", "no outbox"])
def flows(place: Place, request: pytest.FixtureRequest) -> Iterator[Flows]:
    outbox = "relay" if request.param == "outbox" else False
    flows = Flows(place[0], **{"result_backend": "alchemy://", "alchemy_outbox": outbox, **place[1]})
    yield flows
    assert flows.database.column(f"SELECT count(*) FROM {COMPLETED} WHERE nesting < -2") == [0]
    flows.close()


def header(flows: Flows, key: str) -> list[Any]:
    return [flows.step.s(None, key, f"m{number}") for number in range(MEMBERS)]


def ended(flows: Flows, key: str) -> list[str]:
    notes = [f"m{number}" for number in range(MEMBERS)]
    return sorted([*(f"None>{note}" for note in notes), f"{','.join(notes)}>body"])


def test_members_delivered_again(flows: Flows, key: str) -> None:
    result = chord(header(flows, key), flows.step.s(key, "body")).apply_async()
    flows.work(copies=3)
    assert flows.traces(key) == ended(flows, key)
    assert flows.bodies.count("body") == 1
    assert result.get(timeout=1) == "body"


IDS = {"spaces": "{} ", "long": "{}" + "x" * 300, "NUL": "{}\0", "beyond ASCII": "{}\U0001f600", "no text": None}


@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("fails", [False, True])
def test_ids_of_the_users_own(flows: Flows, key: str, kind: str, fails: bool) -> None:
    """The id of a chord is that of its header. One that the column does not hold failed where the chord was sent."""
    template = IDS[kind]
    group_id: Any = uuid.UUID(key) if template is None else template.format(key)

    @flows.task(name="fails")
    async def fails_(task: Any) -> None:
        raise ValueError

    members = [*header(flows, key), *([fails_.si()] if fails else [])]
    body = flows.step.s(key, "body")
    result = chord(members, body).run(group(members).set(task_id=group_id), body, ())
    flows.work(copies=2)
    assert result.parent.id == group_id
    if fails:
        assert (flows.bodies.count("body"), result.state) == (0, states.FAILURE)
    else:
        assert flows.traces(key) == ended(flows, key)
        assert result.get(timeout=1) == "body"


def test_members_that_end_at_the_same_time(flows: Flows, key: str) -> None:
    chord(header(flows, key), flows.step.s(key, "body")).apply_async()
    messages = flows.taken()
    assert len(messages) == MEMBERS
    flows.app.finalize()
    together([lambda one=one: flows.run(one) for one in [*messages, *messages]])  # type: ignore[misc]
    flows.work()
    assert flows.traces(key) == ended(flows, key)
    assert flows.bodies.count("body") == 1


def test_members_that_have_all_seen_the_others(flows: Flows, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all_see_the_others(flows, key, monkeypatch) == 1
    if not flows.app.conf.alchemy_outbox:  # what was taken is lost
        flows.database.execute(f"DELETE FROM {COMPLETED} WHERE nesting < -2")


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_in_other_isolation_levels(
    run_database: Database, key: str, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    options = {"isolation_level": level}
    flows = Flows(run_database, result_backend="alchemy://", alchemy_engine_options=options)
    try:
        assert all_see_the_others(flows, key, monkeypatch) == 1
        flows.work()
        assert flows.traces(key) == ended(flows, key)
    finally:
        flows.close()


def all_see_the_others(flows: Flows, key: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Let each member take itself for the last; return how many of them have sent the body."""
    barrier, values_of = threading.Barrier(MEMBERS), own_chords._values
    chord(header(flows, key), flows.step.s(key, "body")).apply_async()
    messages = flows.taken()
    flows.app.finalize()
    with monkeypatch.context() as patched:
        patched.setattr(own_chords, "_finish", lambda *_, **__: None)
        for message in messages:
            flows.run(message)

    def look(*args: Any) -> Any:
        found = values_of(*args)
        barrier.wait(20)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(own_chords, "_values", look)
        ends = together([lambda one=one: flows.run(one, redelivered=True) for one in messages])  # type: ignore[misc]
    assert [state for state, _ in ends] == ["SUCCESS"] * MEMBERS
    return len(flows.outbox() or flows.taken())


def test_within_a_chain(flows: Flows, key: str) -> None:
    """The chord is begun with the COMMIT of the task before it."""
    step = flows.step
    canvas = chain(step.s(None, key, "a"), group(step.s(key, "g"), step.s(key, "h")), step.s(key, "body"))
    canvas.apply_async()
    flows.work(copies=2)
    assert flows.traces(key) == sorted(["None>a", "a>g", "a>h", "g,h>body"])


def test_a_member_that_was_killed_before_it_looked(flows: Flows, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chord(header(flows, key), flows.step.s(key, "body")).apply_async()
    messages = flows.taken()
    with monkeypatch.context() as patched:
        patched.setattr(type(flows.app.backend), "on_chord_part_return", lambda *_, **__: None)
        for message in messages:
            flows.run(message)
    assert flows.traces(key) == [f"None>m{number}" for number in range(MEMBERS)]
    flows.run(messages[1], redelivered=True)
    flows.work()
    assert flows.traces(key) == ended(flows, key)


def test_a_last_member_that_was_killed_where_a_result_is_gone(
    flows: Flows, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was not counted before its chord has ended: its copy is the last again, and the chord fails. It would wait for
    ever for that result."""
    flows.app.conf.result_chord_join_timeout = 0.1

    @flows.app.task(name="plain", shared=False)
    def plain(number: int) -> str:
        return f"m{number}"

    result = chord([plain.s(number) for number in range(MEMBERS)], flows.step.s(key, "body")).apply_async()
    *others, last = flows.taken()
    for message in others:
        flows.run(message)
    AsyncResult(others[0].headers["id"], app=flows.app).forget()
    with monkeypatch.context() as patched:
        patched.setattr(own_chords, "_finish", lambda *_, **__: None)  # as if it were killed here
        flows.run(last)
    flows.run(last, redelivered=True)
    assert result.state == states.FAILURE
    flows.work()


def test_a_member_that_was_replaced(flows: Flows, key: str) -> None:
    """It is there when its replacement has ended."""

    @flows.task(name="replaced")
    async def replaced(self: Any) -> Any:
        self.db.add(Row(key=key, note="r"))
        return self.replace(flows.step.s("r", key, "m0"))

    result = chord([replaced.s(), flows.step.s(None, key, "m1")], flows.step.s(key, "body")).apply_async()
    for message in flows.taken():
        flows.run(message)
    assert result.parent.results[0].state == states.PENDING
    flows.work(copies=2)
    assert flows.traces(key) == sorted(["r", "r>m0", "None>m1", "m0,m1>body"])
    assert result.parent.results[0].get(timeout=1) == "m0"


def test_a_member_that_fails(flows: Flows, key: str) -> None:
    @flows.task(name="fails")
    async def fails(self: Any) -> None:
        raise ValueError("no")

    result = chord([*header(flows, key), fails.s()], flows.step.s(key, "body")).apply_async()
    flows.work(copies=2)
    assert "body" not in flows.bodies
    assert AsyncResult(result.id, app=flows.app).state == states.FAILURE
    assert "ValueError" in str(AsyncResult(result.id, app=flows.app).result)


def test_errbacks_of_a_chord_that_fails(flows: Flows, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called again, after the worker was killed in between, they have the same ids: each has its effects once."""

    @flows.task(name="fails")
    async def fails(self: Any) -> None:
        raise ValueError("no")

    @flows.task(name="mourns")
    async def mourns(self: Any, failed: str, note: str) -> None:
        flows.bodies.append(note)
        self.db.add(Row(key=key, note=note))

    errbacks = [mourns.s(note) for note in ("one", "two")]
    chord([*header(flows, key), fails.s()], flows.step.s(key, "body").set(link_error=errbacks)).apply_async()
    messages = flows.taken()
    with monkeypatch.context() as patched:
        patched.setattr(own_chords, "_claim", lambda *_: None)  # as if it were killed here
        for message in messages:
            flows.run(message)
    for message in messages:
        flows.run(message, redelivered=True)
    flows.work(copies=2)
    assert flows.traces(key) == sorted([*(f"None>m{number}" for number in range(MEMBERS)), "one", "two"])
    assert sorted(note for note in flows.bodies if note in {"one", "two"}) == ["one", "two"]


def test_members_without_it(flows: Flows, key: str) -> None:
    """Tasks that are no DatabaseTask."""

    @flows.app.task(name="plain", shared=False)
    def plain(number: int) -> str:
        return f"m{number}"

    chord([plain.s(number) for number in range(MEMBERS)], flows.step.s(key, "body")).apply_async()
    flows.work(copies=2)
    assert flows.traces(key) == ["m0,m1,m2,m3>body"]


def test_a_chord_that_ends_while_another_thread_resets_celerys_flag(
    flows: Flows, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Celery's `allow_join_result` sets one flag for all threads of a worker: the chord that ends first resets it while
    another one reads its results, those of a group among its members for one."""
    members = [group(header(flows, key)), flows.step.si(None, key, "last")]
    result = chord(members, flows.step.si(None, key, "body")).apply_async()
    join = ResultSet.join

    def joins(self: Any, **options: Any) -> Any:
        _set_task_join_will_block(True)
        return join(self, **options)

    monkeypatch.setattr(ResultSet, "join", joins)
    try:
        flows.work()
    finally:
        _set_task_join_will_block(False)
    assert "None>body" in flows.traces(key)
    assert result.get(timeout=1) == "body"


def test_sent_with_a_commit(flows: Flows, key: str) -> None:
    """The chord is written down by the transaction that its header waits for."""
    if not flows.app.conf.alchemy_outbox:
        pytest.skip("nothing is written into the transaction")
    canvas = chord(header(flows, key), flows.step.s(key, "body"))
    with pytest.raises(RolledBack):
        flows.by_outbox(canvas, fails=True)
    assert flows.database.column(f"SELECT count(*) FROM {COMPLETED} WHERE nesting < -2") == [0]
    flows.by_outbox(canvas)
    flows.work(copies=2)
    assert flows.traces(key) == ended(flows, key)
