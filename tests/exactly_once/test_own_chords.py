"""`result_backend = "alchemy://"` counts the members of a chord in the database: its body comes once."""

from collections.abc import Iterator
from typing import Any

import pytest
from celery import chain, chord, group, states
from celery.result import AsyncResult
from support.databases import Database
from support.exactly_once import together
from support.once_flows import COMPLETED, Flows

from celery_alchemy import DatabaseTask

MEMBERS = 4


@pytest.fixture(params=["outbox", "no outbox"])
def flows(place: tuple[Database, dict[str, Any]], request: pytest.FixtureRequest) -> Iterator[Flows]:
    outbox = "relay" if request.param == "outbox" else False
    flows = Flows(place[0], **{"result_backend": "alchemy://", "alchemy_outbox": outbox, **place[1]})
    yield flows
    assert flows.database.column(f"SELECT count(*) FROM {COMPLETED} WHERE nesting = -3") == [0]
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


def test_members_that_end_at_the_same_time(flows: Flows, key: str) -> None:
    chord(header(flows, key), flows.step.s(key, "body")).apply_async()
    messages = flows.taken()
    assert len(messages) == MEMBERS
    flows.app.finalize()
    together([lambda one=one: flows.run(one) for one in [*messages, *messages]])  # type: ignore[misc]
    flows.work()
    assert flows.traces(key) == ended(flows, key)
    assert flows.bodies.count("body") == 1


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


def test_a_member_that_fails(flows: Flows, key: str) -> None:
    @flows.app.task(base=DatabaseTask, bind=True, name="fails")
    def fails(self: Any) -> None:
        raise ValueError("no")

    result = chord([*header(flows, key), fails.s()], flows.step.s(key, "body")).apply_async()
    flows.work(copies=2)
    assert "body" not in flows.bodies
    assert AsyncResult(result.id, app=flows.app).state == states.FAILURE
    assert "ValueError" in str(AsyncResult(result.id, app=flows.app).result)


def test_members_without_it(flows: Flows, key: str) -> None:
    """Tasks that are no DatabaseTask."""

    @flows.app.task(name="plain", shared=False)
    def plain(number: int) -> str:
        return f"m{number}"

    chord([plain.s(number) for number in range(MEMBERS)], flows.step.s(key, "body")).apply_async()
    flows.work(copies=2)
    assert flows.traces(key) == ["m0,m1,m2,m3>body"]
