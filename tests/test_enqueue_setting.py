"""`alchemy_enqueue_on_commit`: what user code sends waits for the commit, what Celery sends does not."""

from collections.abc import Iterator

import pytest
from support.databases import PostgreSQL, assert_no_connections
from support.waiting import eventually
from support.worker import Site, Worker, running

WAITS = ["delay", "apply_async", "send_task", "signature", "group", "chain", "chord"]
SENT = {"group": 2, "chain": 2, "chord": 3}


WORKERS = [(pool, outbox) for pool in ("prefork", "threads", "gevent") for outbox in (False, True)]


@pytest.fixture(scope="module", params=WORKERS, ids=[f"{pool}-outbox" if outbox else pool for pool, outbox in WORKERS])
def worker(request: pytest.FixtureRequest, site: Site, run_database: PostgreSQL) -> Iterator[Worker]:
    pool, outbox = request.param
    name = f"{site.prefix[:-1]}-enqueue-{pool}-{outbox}"
    settings = {"alchemy_enqueue_on_commit": True, "alchemy_outbox": outbox}
    options = {"database_url": run_database.url(name), "settings": settings}
    with running(Worker(site, name, pool, modules=("endings", "enqueueing"), **options)) as worker:
        yield worker
    assert run_database.column("SELECT count(*) FROM celery_alchemy_outbox") == [0]
    assert_no_connections(run_database, name)


def heard(worker: Worker, key: str, count: int) -> list[object]:
    found: list[object] = []
    eventually(lambda: found.extend(worker.said(key)) or len(found) >= count, f"{count} things are said")
    return found


@pytest.mark.parametrize("how", WAITS)
def test_what_user_code_sends_waits(worker: Worker, key: str, how: str) -> None:
    assert worker.call("send_by_setting", key, how).state == "SUCCESS"
    first, *rest = heard(worker, key, 1 + SENT.get(how, 1))
    assert first == "body ends"
    assert all(rows == ["row"] for what, rows in rest if what != "all"), rest  # type: ignore[misc]
    assert len(rest) == SENT.get(how, 1)


@pytest.mark.parametrize("how", WAITS)
def test_what_a_failing_task_has_sent_never_arrives(worker: Worker, key: str, how: str) -> None:
    assert worker.call("send_by_setting", key, how, "raise").error == "Boom"
    worker.call("receive", key, "later")
    assert heard(worker, key, 2) == ["body ends", ["later", []]]


@pytest.mark.parametrize("how", ["now", "task says now"])
def test_the_call_and_the_task_may_say_otherwise(worker: Worker, key: str, how: str) -> None:
    worker.call("send_by_setting", key, how, "raise")
    assert sorted(map(str, heard(worker, key, 2))) == ["['received', []]", "body ends"]


def published(said: list[object]) -> list[list[str]]:
    """Return the rows that everyone could see when the messages about a watched key were sent."""
    return [one["rows"] for one in said if isinstance(one, dict)]


def test_the_call_wins_over_the_task(worker: Worker, watched_key: str) -> None:
    worker.call("send_to_one_that_waits", watched_key, False)
    assert published(heard(worker, watched_key, 3)) == [[]]


def test_the_task_wins_over_its_absence_in_the_call(worker: Worker, watched_key: str) -> None:
    worker.call("send_to_one_that_waits", watched_key)
    assert published(heard(worker, watched_key, 3)) == [["row"]]


def test_a_retry_and_a_replacement_are_celerys_own(worker: Worker, key: str) -> None:
    assert worker.call("retry_with_the_setting", key).value == "second"
    worker.call("replace_with_the_setting", key)
    assert heard(worker, key, 1) == [["replacement", ["attempt 1", "replaced"]]]


def test_a_link_of_a_task_that_runs_eagerly_is_celerys_own(worker: Worker, watched_key: str) -> None:
    """It belongs to a task that has ended, not to the block around that, which is not committed yet."""
    assert worker.call("eager_link", watched_key).state == "SUCCESS"
    assert published(heard(worker, watched_key, 4)) == [[]]
