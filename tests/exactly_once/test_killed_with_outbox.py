"""The hazards of research on a real worker, with what comes next in the outbox: one certain SIGKILL each, or a broker
that loses a message. Nothing is sent again by hand: the outbox does."""

from collections.abc import Iterator

import pytest
from support import databases
from support.once_kills import EXPECTED, Kills
from support.waiting import eventually
from support.worker import Site

HAZARDS = {
    "1 a link": ("chain", ("before publish", "after publish", "before result", "after done")),
    "2 taken and not noted": ("chain", ("before noted", "after noted")),
    "4 a member between its result and the count": ("chord", ("after result", "before count")),
    "5 the last member between its claim and the body": ("chord", ("before publish", "after publish", "after count")),
    "9 between the COMMIT and the replacement": ("replace", ("before COMMIT", "after COMMIT", "after publish")),
    "a retry": ("retry", ("before publish", "after publish")),
    "what the body sends": ("follow", ("before COMMIT", "after COMMIT", "before publish", "after publish")),
}
WITHIN_S = 40.0


@pytest.fixture(scope="module", params=["redis", "alchemy"])
def kills(site: Site, run_database: databases.PostgreSQL, request: pytest.FixtureRequest) -> Iterator[Kills]:
    own = {"result_backend": "alchemy://", "task_acks_late": True, "task_reject_on_worker_lost": True}
    kills = Kills(
        site, run_database, "prefork", "", alchemy_exactly_once=True, alchemy_outbox=True, alchemy_outbox_resend_s=2,
        alchemy_outbox_attempts=100, **own if request.param == "alchemy" else {},
    )  # fmt: skip
    try:
        kills.start()
        yield kills
    finally:
        kills.stop()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("hazard", HAZARDS)
def test_a_certain_kill(kills: Kills, hazard: str) -> None:
    kind, points = HAZARDS[hazard]
    for point in points:
        before = kills.killed()
        key, done = kills.run(kind, point, within_s=WITHIN_S, by_outbox=True)
        assert done, f"{kind} is lost {point}: {kills.traces(key)}\n{kills.tail()}"
        if "alchemy" not in str(kills.app.backend):
            kills.wait_for_kill(before, point)
        assert kills.traces(key) == sorted(EXPECTED[kind]), point
    assert kills.failures() == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", EXPECTED)
def test_the_broker_loses_everything(kills: Kills, kind: str) -> None:
    """Redis is emptied when a flow has begun, and twice later."""
    key, losses = kills.send(kind, by_outbox=True), 0

    def is_done() -> bool:
        nonlocal losses
        if losses < 3:
            losses += 1
            kills.lose_messages()
        kills.keep_up()
        return kills.is_done(key, kind)

    eventually(is_done, f"{kind} is done", within_s=WITHIN_S)
    assert kills.traces(key) == sorted(EXPECTED[kind]), kills.tail()
