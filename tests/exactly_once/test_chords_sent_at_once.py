"""Chords whose header, or a part of it, does not wait for the COMMIT that the others wait for: the members that have
ended before it are counted, and the body comes once."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import chain, chord, group
from support.exactly_once import Place, done, fixture_of
from support.once_flows import COMPLETED, OF_REDIS_RESULTS, Flows, redis_results
from support.project.models import Row
from support.worker import Site

from celery_alchemy.strategies.place import current_coroutine

place = fixture_of(["psycopg-along", "mariadb", "await psycopg", "await asyncpg"])
KINDS = ["chord", "a group in a chain", "a chain in the header", "a chord in the header", "a group in the header"]
pytestmark = pytest.mark.filterwarnings(*OF_REDIS_RESULTS)


@pytest.fixture(params=["outbox", "memory"])
def flows(place: Place, results: str, site: Site, request: pytest.FixtureRequest) -> Iterator[Flows]:
    settings: dict[str, Any] = redis_results(site) if results == "redis" else {"result_backend": results}
    settings |= {"alchemy_outbox": "relay" if request.param == "outbox" else False, "alchemy_enqueue_on_commit": True}
    flows = Flows(place[0], **{**settings, **place[1]})
    yield flows
    assert flows.database.column(f"SELECT count(*) FROM {COMPLETED} WHERE nesting < -2") == [0]
    flows.close()


def canvas_of(kind: str, flows: Flows, early: Any, key: str) -> tuple[Any, list[str]]:
    """Return a canvas with members of the task `early`, and the traces that are due."""
    step, last = flows.step, flows.step.s(key, "body")
    header, traces = [early.si(None, key, "a"), step.si(None, key, "b")], ["None>a", "None>b"]
    if kind == "a chain in the header":
        return chord([chain(early.si(None, key, "c"), step.s(key, "d")), *header], last), [
            *traces, "None>c", "c>d", "d,a,b>body",
        ]  # fmt: skip
    if kind == "a chord in the header":
        inner = chord([early.si(None, key, "c"), step.si(None, key, "d")], step.s(key, "inner"))
        return chord([*header, inner], last), [*traces, "None>c", "None>d", "c,d>inner", "a,b,inner>body"]
    if kind == "a group in the header":
        inner = group([early.si(None, key, "c"), step.si(None, key, "d")])
        return chord([*header, inner], last), [*traces, "None>c", "None>d", "a,b,d,c>body"]  # in Celery's order
    if kind == "a group in a chain":
        return chain(group(header), last), [*traces, "a,b>body"]
    return chord(header, last), [*traces, "a,b>body"]


async def meanwhile(call: Callable[[], None]) -> None:
    """Call it in another thread, and wait for its end."""
    if current_coroutine() is not None:
        await asyncio.to_thread(call)
        return
    thread = threading.Thread(target=call)
    thread.start()
    thread.join(60)


@pytest.mark.parametrize(
    ("how", "results"),
    [("a member", "alchemy://"), ("all members", "alchemy://"), ("the call", "alchemy://"), ("the call", "redis")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_members_that_end_before_the_commit(flows: Flows, key: str, kind: str, how: str, results: str) -> None:
    @flows.task(name="early", enqueue_on_commit=None if how == "the call" else False)
    async def early(self: Any, got: Any, key: str, note: str) -> str:
        flows.bodies.append(note)
        self.db.add(Row(key=key, note=f"{got}>{note}"))
        await done(self.db.flush())
        return note

    if how == "all members":
        flows.step.enqueue_on_commit = False
    canvas, traces = canvas_of(kind, flows, early, key)
    options = {"enqueue_on_commit": False} if how == "the call" else {}
    ran: list[str] = []

    def work() -> None:
        ran.extend(name for message in flows.taken() if (name := message.headers["task"]) and flows.run(message))

    @flows.task(name="sends")
    async def sends(self: Any) -> None:
        await done(self.db.flush())
        canvas.apply_async(**options)
        await done(meanwhile(work))

    sends.apply_async(enqueue_on_commit=False)
    (message,) = flows.taken()
    assert flows.run(message)[0] == "SUCCESS"
    assert "early" in ran
    flows.work(copies=2)
    assert flows.traces(key) == sorted(traces)
    assert flows.bodies.count("body") == 1
