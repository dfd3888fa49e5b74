"""Hazard 8: Celery's own Redis backend counts the members of a chord, here on a real server: each counts once, however
often it is delivered, and the body comes once."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from celery import VERSION, chord
from support.databases import Database
from support.exactly_once import together
from support.once_flows import OF_REDIS_RESULTS, Flows, redis_results
from support.worker import Site

from celery_alchemy.workers.asyncio_pool.offloading import OffloadedBackend
from celery_alchemy.workers.exactly_once import chords

MEMBERS = 4
pytestmark = pytest.mark.filterwarnings(*OF_REDIS_RESULTS)


@pytest.fixture(params=["ordered", "unordered"])
def flows(place: tuple[Database, dict[str, Any]], site: Site, request: pytest.FixtureRequest) -> Iterator[Flows]:
    if request.param == "unordered" and VERSION[:2] < chords.COUNTS_BY_ID:
        pytest.skip("refused with exactly_once: it counts deliveries")
    settings = redis_results(site, result_chord_ordered=request.param == "ordered")
    flows = Flows(place[0], **settings, **place[1])
    yield flows
    flows.close()


def due(key: str) -> list[str]:
    return sorted([*(f"None>m{number}" for number in range(MEMBERS)), "m0,m1,m2,m3>body"])


def header(flows: Flows, key: str) -> list[Any]:
    return [flows.step.s(None, key, f"m{number}") for number in range(MEMBERS)]


def values_in_order(trace: str) -> str:
    """An unordered chord gives its body the results in the order in which they came."""
    got, _, note = trace.partition(">")
    return ",".join(sorted(got.split(","))) + ">" + note


def test_members_delivered_again(flows: Flows, key: str) -> None:
    chord(header(flows, key), flows.step.s(key, "body")).apply_async()
    messages = flows.taken()
    for message in [*messages[:2], *messages[:2], *messages[:2]]:  # as many deliveries as it has members, and more
        flows.run(message, redelivered=True)
    flows.work()
    assert "body" not in flows.bodies
    for message in messages[2:]:
        flows.run(message)
    flows.work(copies=2)
    assert sorted(map(values_in_order, flows.traces(key))) == due(key)
    assert flows.bodies.count("body") == 1


def test_copies_at_the_same_moment(flows: Flows, key: str) -> None:
    chord(header(flows, key), flows.step.s(key, "body")).apply_async()
    messages = flows.taken()
    flows.app.finalize()
    together([lambda one=one: flows.run(one) for one in [*messages, *messages]])  # type: ignore[misc]
    flows.work(copies=2)
    assert sorted(map(values_in_order, flows.traces(key))) == due(key)
    assert flows.bodies.count("body") == 1


@pytest.mark.skipif(VERSION[:2] < chords.COUNTS_BY_ID, reason="this Celery has no lease")
@pytest.mark.parametrize("redelivered", [False, True])
@pytest.mark.parametrize("outbox", [False, "relay"])
def test_a_member_that_fails_does_not_end_while_one_that_is_killed_has_the_lease(
    flows: Flows, key: str, redelivered: bool, outbox: Any
) -> None:
    """Its copy runs, and fails again. Without it the errbacks of the chord would never be sent."""
    flows.app.conf.alchemy_outbox = outbox  # read when it is first used

    @flows.task(name="fails")
    async def fails(self: Any) -> None:
        raise KeyError(key)

    body = flows.step.s(key, "body").on_error(flows.step.si(None, key, "errback"))
    chord([flows.step.s(None, key, "m0"), fails.s()], body).apply_async()
    first, last = flows.taken()
    flows.run(first)
    backend: Any = flows.app.backend
    lease = backend.get_key_for_group(last.headers["group"], chords.CLAIM)
    backend.client.set(lease, "of a copy that is killed", px=60_000 if redelivered else 500)
    assert flows.run(last, redelivered=redelivered)[0] == "FAILURE"
    flows.work(copies=2)
    assert flows.traces(key) == ["None>errback", "None>m0"]
    assert flows.bodies.count("errback") == 1


class Here:
    """Does at once what the threads of the worker pool asyncio would do."""

    def run(self, function: Callable[[], Any]) -> Future[Any]:
        found: Future[Any] = Future()
        found.set_result(function())
        return found


@pytest.mark.skipif(VERSION[:2] < chords.COUNTS_BY_ID, reason="this Celery has no lease")
@pytest.mark.parametrize("backend_of", ["Celery", "asyncio"])
@pytest.mark.parametrize("copies", [1, 2])
def test_no_member_ends_while_one_that_is_killed_has_the_lease(
    flows: Flows, key: str, copies: int, backend_of: str
) -> None:
    backend: Any = flows.app.backend
    if backend_of == "asyncio":  # what stands for it in that worker pool
        flows.step.backend = OffloadedBackend(backend, lambda: backend, Here(), Here())  # type: ignore[arg-type]
    chord(header(flows, key), flows.step.s(key, "body")).apply_async()
    *others, last = flows.taken()
    for message in others:
        flows.run(message)
    lease = backend.get_key_for_group(last.headers["group"], chords.CLAIM)
    # A copy does not wait until it is over by itself.
    backend.client.set(lease, "of a copy that is killed", px=500 if copies == 1 else 60_000)
    flows.app.finalize()
    together([lambda: flows.run(last)] * copies)
    assert backend.client.get(lease) == chords.DONE
    flows.work(copies=2)
    assert sorted(map(values_in_order, flows.traces(key))) == due(key)
    assert flows.bodies.count("body") == 1
