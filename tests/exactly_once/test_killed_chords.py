"""Workers that are killed while a chord ends, or fails, and while a task fails: one certain SIGKILL each. What comes
next is there once, whatever the broker has acknowledged."""

from collections.abc import Iterator
from typing import Any

import pytest
from support import databases
from support.once_kills import DUE, Kills
from support.worker import Site

POINTS = ("before COMMIT", "after COMMIT", "before result", "before count", "before claimed", "after claimed")
WITHIN_S = 40.0


def made(site: Site, database: databases.Database, **more: Any) -> Iterator[Kills]:
    settings: dict[str, Any] = {"alchemy_exactly_once": True, "result_backend": "alchemy://"}
    settings |= {"task_acks_late": True, "task_reject_on_worker_lost": True}
    kills = Kills(site, database, "prefork", "", **{**settings, **more})
    try:
        kills.start()
        yield kills
    finally:
        kills.stop()


OUTBOX = {"alchemy_outbox": True, "alchemy_outbox_resend_s": 2, "alchemy_outbox_attempts": 100}


@pytest.fixture(scope="module", params=["outbox", "no outbox"])
def kills(site: Site, run_database: databases.PostgreSQL, request: pytest.FixtureRequest) -> Iterator[Kills]:
    yield from made(site, run_database, **OUTBOX if request.param == "outbox" else {})


@pytest.fixture(scope="module")
def early(site: Site, run_database: databases.PostgreSQL) -> Iterator[Kills]:
    """Messages are acknowledged before their tasks run: the broker delivers none again."""
    yield from made(site, run_database, late=False, task_acks_late=False, **OUTBOX)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["chord", "failing chord", "failing"])
def test_a_certain_kill(kills: Kills, kind: str) -> None:
    points = POINTS if kind != "failing" else ("before result", "after result", "before publish", "after publish")
    for point in points:
        before = kills.killed()
        key, done = kills.run(kind, point, within_s=WITHIN_S, by_outbox=bool(kills.app.conf.get("alchemy_outbox")))
        kills.wait_for_kill(before, point)
        assert done, f"{kind} is lost {point}: {kills.traces(key)}\n{kills.tail()}"
        assert kills.traces(key) == sorted(DUE[kind]), point


@pytest.mark.timeout(300)
@pytest.mark.parametrize("point", ["after COMMIT", "before result", "before count", "before claimed"])
def test_a_member_whose_message_is_acknowledged(early: Kills, point: str) -> None:
    """It is killed after its COMMIT, and before it is counted: the outbox keeps its message until it is."""
    before = early.killed()
    key, done = early.run("chord", point, within_s=WITHIN_S, by_outbox=True)
    early.wait_for_kill(before, point)
    assert done, f"the chord is lost {point}: {early.traces(key)}\n{early.tail()}"
    assert early.traces(key) == sorted(DUE["chord"])


@pytest.fixture(scope="module")
def plain(site: Site, run_database: databases.PostgreSQL) -> Iterator[Kills]:
    """Without what else would mend it: results in Redis, and no outbox."""
    yield from made(site, run_database, result_backend=site.urls.celery)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("kind", "point"),
    [
        *(
            ("chord", f"{when} {what}")
            for what in ("COMMIT", "result", "count", "publish")
            for when in ("before", "after")
        ),
        *(("chain", f"{when} {what}") for what in ("COMMIT", "result", "publish") for when in ("before", "after")),
    ],
)
def test_celerys_main_process_gives_it_back(plain: Kills, kind: str, point: str) -> None:
    """The member that ends last is killed with its claim of the chord (hazard 5), a task with its result (3 and 4)."""
    before = plain.killed()
    key, done = plain.run(kind, point, within_s=WITHIN_S)
    plain.wait_for_kill(before, point)
    assert done, f"the {kind} is lost {point}: {plain.traces(key)}\n{plain.tail()}"
    assert plain.traces(key) == sorted(DUE[kind])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["chain", "retry", "follow"])
def test_a_task_that_dies_before_its_commit(early: Kills, kind: str) -> None:
    """Celery's main process says that it has failed (WorkerLostError), and the broker has no message of it any more."""
    before = early.killed()
    key, done = early.run(kind, "before COMMIT", within_s=WITHIN_S, by_outbox=True)
    early.wait_for_kill(before, "before COMMIT")
    assert done, f"the {kind} is lost: {early.traces(key)}\n{early.tail()}"
    assert early.traces(key) == sorted(DUE[kind])
