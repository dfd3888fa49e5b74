"""A task that commits before its end: refused where its result is needed, for the result is lost with its worker."""

from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from sqlalchemy import text
from support.exactly_once import BOTH_SPELLINGS, Once, Place, done, fixture_of, new_id
from support.project.models import Row

from celery_alchemy.strategies.errors import ResultLost
from celery_alchemy.workers.exactly_once import runner

NEXT = ["callbacks", "errbacks", "chain", "chord"]


place = fixture_of(BOTH_SPELLINGS)


def following(once: Once, what: str, *, immutable: bool) -> dict[str, Any]:
    """Return what the message of a task has where `what` comes after it."""
    signature = dict(once.app.signature("next", (), immutable=immutable, task_id=new_id()))
    return {what: signature if what == "chord" else [signature]}


def sent_by(once: Once, looks: Callable[[], None] = lambda: None) -> list[str]:
    """Return a list of what is sent from now on.

    Args:
        looks: Is called when it is.
    """
    sent: list[str] = []

    def send_task(name: str, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        looks()
        sent.append(name)
        return once.app.AsyncResult(options["task_id"])

    once.app.send_task = send_task
    return sent


def killed_after_its_commit(once: Once, monkeypatch: pytest.MonkeyPatch, key: str, task_id: str, **request: Any) -> Any:
    """Deliver a task that dies between its own COMMIT and its end; return it."""
    monkeypatch.setattr(runner, "WAITS_FOR_RESULT_S", 0.1)
    monkeypatch.setattr(runner, "RUNS_FOR_S", 0.0)

    @once.task(exactly_once=True, name="work")
    async def work(self: Any) -> str:
        self.db.add(Row(key=key))
        await done(self.db.commit())
        raise SystemExit  # as if its process were killed now

    with pytest.raises(SystemExit):
        once.deliver(work, task_id=task_id, **request)
    assert once.database.rows(key) == [""]
    return work


@pytest.mark.parametrize("mode", ["first", "last"])
@pytest.mark.parametrize("what", NEXT)
def test_it_is_refused_where_something_comes_next(once: Once, mode: Any, what: str, key: str) -> None:
    """Nothing is committed."""

    @once.task(exactly_once=mode)
    async def work(self: Any) -> str:
        self.db.add(Row(key=key))
        await done(self.db.commit())
        return "done"

    task_id = new_id()
    # A chord's own part would be counted by the result backend, which is none that can.
    request = following(once, what, immutable=False) | ({"group": new_id()} if what == "chord" else {})
    once.app.backend.on_chord_part_return = lambda *_, **__: None
    sent_by(once)
    state, error = once.deliver(work, task_id=task_id, **request)
    assert (state, type(error).__name__) == ("FAILURE", "CommittedEarly")
    assert "Leave self.db.commit() out" in str(error)
    assert once.database.rows(key) == []
    assert once.recorded(task_id) == []


def test_past_the_session_too(once: Once, key: str) -> None:
    @once.task(exactly_once=True)
    async def work(self: Any) -> str:
        self.db.add(Row(key=key))
        await done(self.db.flush())
        connection = await done(self.db.connection())
        await done(connection.commit())
        return "done"

    sent_by(once)
    state, error = once.deliver(work, task_id=new_id(), **following(once, "callbacks", immutable=False))
    assert (state, type(error).__name__) == ("FAILURE", "CommittedEarly")
    assert once.database.rows(key) == []


@pytest.mark.parametrize("what", ["callbacks", "chain"])
def test_what_takes_no_result_goes_on_without_it(
    once: Once, key: str, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    sent = sent_by(once)
    task_id = new_id()
    request = {"ignore_result": True, **following(once, what, immutable=True)}
    work = killed_after_its_commit(once, monkeypatch, key, task_id, **request)
    assert sent == []
    assert once.deliver(work, task_id=task_id, **request) == ("SUCCESS", None)
    assert sent == ["next"]
    assert once.database.rows(key) == [""]


def test_where_results_are_kept_nowhere_nothing_is_lost(
    place: Place, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = Once(place[0], **{**place[1], "result_backend": "disabled://"})
    task_id = new_id()
    try:
        work = killed_after_its_commit(once, monkeypatch, key, task_id)
        assert once.deliver(work, task_id=task_id) == ("SUCCESS", None)
    finally:
        once.close()


def test_who_asks_for_the_result_of_a_task_alone_is_told(once: Once, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing comes after it, so nothing fails with it."""
    task_id = new_id()
    work = killed_after_its_commit(once, monkeypatch, key, task_id)
    state, error = once.deliver(work, task_id=task_id)
    assert (state, type(error).__name__) == ("FAILURE", "ResultLost")
    assert once.database.rows(key) == [""]


ENDINGS: dict[str, Any] = {
    "Ignore": (Ignore, "IGNORED", "IGNORED"),
    "Reject": (lambda: Reject("no", requeue=False), "REJECTED", "IGNORED"),
    "Reject, to be delivered again": (lambda: Reject("no", requeue=True), "REJECTED", "IGNORED"),
    "KeyError('later')": (lambda: KeyError("later"), "FAILURE", "FAILURE"),
    "SoftTimeLimitExceeded(5)": (lambda: SoftTimeLimitExceeded(5), "FAILURE", "FAILURE"),
}


@pytest.mark.parametrize("mode", ["first", "last"])
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("goes_on", [False, True])
def test_a_copy_of_one_that_did_not_return_ends_at_once(
    once: Once, key: str, ending: str, mode: Any, goes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows how the first one has ended: it waits for no result, and does not go back to the broker again and
    again."""
    monkeypatch.setattr(runner, "WAITS_FOR_RESULT_S", 0.0)
    make, state, of_a_copy = ENDINGS[ending]

    @once.task(exactly_once=mode, acks_late=True, name="work")
    async def work(self: Any) -> None:
        self.db.add(Row(key=key))
        await done(self.db.commit())
        if goes_on:  # in a transaction that is rolled back
            self.db.add(Row(key=key, note="rolled back"))
            await done(self.db.flush())
        raise make()

    task_id = new_id()
    assert once.deliver(work, task_id=task_id)[0] == state
    for _ in range(2):
        found, error = once.deliver(work, task_id=task_id, redelivered=True)
        assert found == of_a_copy
        if found == "FAILURE":
            assert isinstance(error, ResultLost)
            assert ending in str(error)
    assert once.database.rows(key) == [""]


@pytest.mark.parametrize("mode", ["first", "last"])
@pytest.mark.parametrize("goes_on", [False, True])
def test_one_that_is_replaced_after_its_commit(once: Once, key: str, mode: Any, goes_on: bool) -> None:
    """Its row says so before the replacement is sent, and still does when the task has looked into the database after
    that. A copy sends the replacement again."""
    task_id, notes = new_id(), []
    sent = sent_by(once, lambda: notes.extend(row[3] for row in once.recorded(task_id)))

    @once.task(exactly_once=True, name="other")
    async def other(self: Any) -> None: ...

    @once.task(exactly_once=mode, acks_late=True, name="work")
    async def work(self: Any) -> Any:
        self.db.add(Row(key=key))
        await done(self.db.commit())
        try:
            return self.replace(other.s())
        except Ignore:
            if goes_on:
                await done(self.db.execute(text("SELECT 1")))
            raise

    for _ in range(2):
        assert once.deliver(work, task_id=task_id)[0] == "IGNORED"
    assert sent == ["other"] * 2
    assert ["other" in note for note in notes] == [True] * 2
    assert once.database.rows(key) == [""]


@pytest.mark.parametrize("commits", [True, False])
def test_one_that_is_replaced_and_has_not_committed_writes_no_more(
    once: Once, key: str, commits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its COMMIT has written the row; without one there is none."""
    sent, written = sent_by(once), []
    monkeypatch.setattr(runner.ExactlyOnceRunner, "_write", lambda *_: written.append(1))

    @once.task(exactly_once=True, name="other")
    async def other(self: Any) -> None: ...

    @once.task(exactly_once=True, name="work", commit_on_success=commits)
    async def work(self: Any) -> Any:
        self.db.add(Row(key=key))
        return self.replace(other.s())

    task_id = new_id()
    assert once.deliver(work, task_id=task_id)[0] == "IGNORED"
    assert (sent, written) == (["other"], [])
    assert len(once.recorded(task_id)) == len(once.database.rows(key)) == commits


@pytest.mark.parametrize("mode", ["first", "last"])
def test_what_raises_after_the_commit_takes_no_result_away(once: Once, key: str, mode: Any) -> None:
    """The row has it already."""

    def fail() -> None:
        raise KeyError(key)

    @once.task(exactly_once=mode)
    async def work(self: Any) -> str:
        self.db.add(Row(key=key))
        once.db.on_commit(fail, raises=True)
        return "done"

    task_id = new_id()
    assert once.deliver(work, task_id=task_id)[0] == "FAILURE"
    assert once.deliver(work, task_id=task_id) == ("SUCCESS", "done")
    assert once.database.rows(key) == [""]


def test_one_that_has_not_committed_takes_no_result_away(once: Once, key: str) -> None:
    """A copy may have committed meanwhile, with "last"."""
    if once.awaits:
        pytest.skip("the first one would stop the event loop of its copy")
    runs: list[int] = []

    @once.task(exactly_once="last")
    async def work(self: Any) -> str:
        self.db.add(Row(key=key))
        runs.append(1)
        if len(runs) > 1:
            return "done"
        thread = Thread(target=lambda: once.deliver(work, task_id=task_id))
        thread.start()
        thread.join(20)
        raise Ignore

    task_id = new_id()
    once.app.finalize()
    assert once.deliver(work, task_id=task_id)[0] == "IGNORED"
    assert once.deliver(work, task_id=task_id) == ("SUCCESS", "done")
    assert once.database.rows(key) == [""]
