"""Chords of `alchemy://` where an event loop takes them off itself, as in a worker: what waits for a COMMIT waits."""

from collections.abc import Iterator
from typing import Any

import pytest
from celery import chord
from support.exactly_once import AWAITED_SERVERS, Place, fixture_of
from support.once_flows import COMPLETED, Flows

from celery_alchemy.strategies.asynchronous import loop_thread
from celery_alchemy.workers.asyncio_pool import beside

place = fixture_of(AWAITED_SERVERS)


@pytest.fixture(params=["outbox", "no outbox"])
def flows(place: Place, request: pytest.FixtureRequest) -> Iterator[Flows]:
    loop_thread.stop()
    outbox = "relay" if request.param == "outbox" else False
    # One thread for results, so that none may wait for another.
    settings = {"result_backend": "alchemy://", "broker_pool_limit": 1, "alchemy_outbox": outbox}
    flows = Flows(place[0], **{**settings, **place[1]})
    beside.take_off(flows.app)
    yield flows
    beside.leave(flows.app)
    loop_thread.stop()
    flows.close()


def members_of(flows: Flows, key: str) -> list[Any]:
    return [flows.step.s(None, key, note) for note in ("a", "b")]


def begun(flows: Flows) -> Any:
    return flows.database.column(f"SELECT count(*) FROM {COMPLETED} WHERE nesting < -2")[0]


@pytest.mark.parametrize("how", ["exactly once", "exactly once, delay", "delay_on_commit"])
def test_a_chord_that_waits_for_the_commit(flows: Flows, key: str, how: str) -> None:
    if not flows.app.conf.alchemy_outbox:
        pytest.skip("a chord is begun before its header waits")
    seen: list[Any] = []

    @flows.task(name="sends", exactly_once=how != "delay_on_commit")
    async def sends(self: Any, fails: bool) -> None:
        await self.db.flush()
        canvas = chord(members_of(flows, key), flows.step.s(key, "body"))
        if how == "exactly once, delay":
            canvas.delay()
        else:
            flows.db.delay_on_commit(canvas)
        seen.append((len(flows.taken()), begun(flows)))
        if fails:
            raise ValueError

    for fails in (True, False):
        sends.delay(fails)
        (message,) = flows.taken()
        flows.run(message)
        assert seen.pop() == (0, 0), "sent, or written down, before the COMMIT"
        assert (begun(flows) == 0) is fails
        flows.work()
        assert flows.traces(key) == ([] if fails else ["None>a", "None>b", "a,b>body"])


def test_a_chord_that_is_the_body_of_a_chord(flows: Flows, key: str) -> None:
    inner = chord([flows.step.si(None, key, note) for note in ("c", "d")], flows.step.s(key, "last"))
    chord(members_of(flows, key), inner).delay()
    flows.work()
    assert flows.traces(key) == ["None>a", "None>b", "None>c", "None>d", "c,d>last"]
    assert begun(flows) == 0
