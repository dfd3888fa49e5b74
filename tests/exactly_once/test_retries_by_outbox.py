"""Retries of tasks with `exactly_once` and an outbox: each is kept there until it has completed."""

from typing import Any

import pytest
from celery.exceptions import Ignore
from support.exactly_once import BOTH_SPELLINGS, done, fixture_of
from support.once_flows import OUTBOX, Flows
from support.project.models import Row

place = fixture_of(BOTH_SPELLINGS)


def test_a_request_that_is_tried_again_is_not_sent_again_meanwhile(flows: Flows, key: str) -> None:
    @flows.task(name="again", max_retries=None)
    async def again(self: Any) -> str:
        await done(self.db.flush())
        raise self.retry(countdown=5000)

    flows.by_outbox(again)
    flows.send()
    (message,) = flows.taken()
    assert flows.run(message)[0] == "RETRY"
    flows.send()
    (left_s,) = flows.database.column(f"SELECT max(due_at) - min(created_at) FROM {OUTBOX}")
    assert 5900 < float(left_s) < 6100


@pytest.mark.parametrize("by", ["retry", "autoretry", "retry in an except"])
@pytest.mark.parametrize("by_outbox", [False, True])
def test_a_retry_that_the_broker_loses_is_sent_again(flows: Flows, key: str, by: str, by_outbox: bool) -> None:
    """The outbox keeps it until it has completed, in the place of the message of the attempt before."""
    options: dict[str, Any] = {"autoretry_for": (ValueError,), "retry_backoff": False} if by == "autoretry" else {}

    @flows.task(name="again", max_retries=5, default_retry_delay=0, **options)
    async def again(self: Any) -> str:
        self.db.add(Row(key=key, note=f"work {self.request.retries}"))
        await done(self.db.flush())
        if self.request.retries == 2:
            return "done"
        if by == "retry":
            raise self.retry()
        try:
            raise ValueError("no")
        except ValueError as error:
            if by == "autoretry":
                raise
            self.retry(exc=error)

    if by_outbox:
        flows.by_outbox(again)
        flows.send()
    else:
        again.apply_async()
    (message,) = flows.taken()
    for retries in (1, 2):
        assert flows.run(message)[0] == "RETRY"
        flows.send()
        assert len(flows.outbox()) == 1
        (lost,) = flows.taken()
        assert lost.headers["retries"] == retries
        flows.later()
        flows.send()
        (message,) = flows.taken()
        assert (message.headers["id"], message.headers["retries"]) == (lost.headers["id"], retries)
    assert flows.run(message) == ("SUCCESS", "done")
    assert flows.traces(key) == ["work 2"]
    flows.sweep()
    assert flows.outbox() == []


@pytest.mark.parametrize("ends", ["raises", "returns", "fails", "is ignored"])
def test_a_retry_is_sent_when_the_state_is_stored(
    place: Any, key: str, ends: str, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Or the result of a retry that is quicker would be overwritten. It is sent however the attempt ends."""
    flows = Flows(place[0], **{**place[1], "alchemy_outbox": True, "alchemy_outbox_resend_s": 1000})
    try:

        @flows.task(name="again", max_retries=5, default_retry_delay=0)
        async def again(self: Any) -> str:
            if self.request.retries:
                return "done"
            error = self.retry(throw=False)
            if ends == "raises":
                raise error
            if ends == "fails":
                raise ValueError(ends)
            if ends == "is ignored":
                raise Ignore
            return ends

        sent: list[int] = []
        backend = type(flows.app.backend)
        for name in ("mark_as_retry", "mark_as_done", "mark_as_failure"):
            stores = getattr(backend, name)
            monkeypatch.setattr(backend, name, _looking(flows, sent, stores))
        again.apply_async()
        (message,) = flows.taken()
        state = flows.run(message)[0]
        assert state == {"raises": "RETRY", "returns": "SUCCESS", "fails": "FAILURE", "is ignored": "IGNORED"}[ends]
        assert sent == ([] if ends == "is ignored" else [0])
        (retry,) = flows.taken()
        assert retry.headers["retries"] == 1
        assert "in a transaction of its own" not in caplog.text  # that of the outbox
    finally:
        monkeypatch.undo()
        flows.close()


def _looking(flows: Flows, sent: list[int], stores: Any) -> Any:
    def store(*args: Any, **kwargs: Any) -> Any:
        sent.append(len(flows.taken()))
        return stores(*args, **kwargs)

    return store
