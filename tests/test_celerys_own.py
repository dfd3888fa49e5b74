"""What Celery itself sends never waits, whatever stands between it and the broker: own overrides, tracing agents."""

from collections.abc import Iterator

import pytest
from support.databases import PostgreSQL, assert_no_connections
from support.waiting import eventually
from support.worker import Site, Worker, running

CANVASES = {  # how many messages are heard
    "signature": 1,
    "chain": 2,
    "group": 2,
    "chord": 3,
    "chord of chains": 5,
    "chain of chords": 4,
    "chain that begins with a group": 3,
    "nested groups": 3,
}
AGENTS = ("none", "sentry", "opentelemetry")
WORKERS = [(pool, agent) for pool in ("prefork", "threads") for agent in AGENTS]
WORKERS += [("threads", agent, "outbox") for agent in AGENTS]


@pytest.fixture(scope="module", params=WORKERS, ids=["-".join(worker) for worker in WORKERS])
def worker(request: pytest.FixtureRequest, site: Site, run_database: PostgreSQL) -> Iterator[Worker]:
    pool, agent, *outbox = request.param
    name = f"{site.prefix[:-1]}-own-{'-'.join(request.param)}"
    options = {
        "database_url": run_database.url(name),
        "settings": {"alchemy_enqueue_on_commit": True, "alchemy_outbox": bool(outbox)},
        "environment": {"TRACING_AGENT": agent},
        "modules": ("endings", "celerys"),
    }
    with running(Worker(site, name, pool, **options)) as worker:
        yield worker
    assert_no_connections(run_database, name)


def heard(worker: Worker, key: str, count: int) -> dict[str, list[str]]:
    """Return the rows that could be seen when each message arrived, by what it says."""
    found: list[tuple[str, list[str]]] = []
    eventually(lambda: found.extend(worker.said(key)) or len(found) >= count, f"{count} things are said")
    assert len(found) == count, found
    return dict(found)


@pytest.mark.parametrize(
    "task",
    [
        "plain_retry",
        "plain_autoretry",
        "plain_retry_by_hand",
        "plain_retry_of_the_caller",
        "overriding_autoretry",
        "retry_by_hand",
        "usual_autoretry",
        "retry_in_a_block",
        "once_retry",
    ],
)
def test_a_retry(worker: Worker, key: str, task: str) -> None:
    assert worker.call(task, key).value == "second"


def test_a_retry_passes_through_the_overrides_of_its_task(worker: Worker, key: str) -> None:
    assert worker.call("overriding_retry", key).value == ["second", "acme"]


@pytest.mark.parametrize("how", CANVASES)
@pytest.mark.parametrize("task", ["plain_replace", "plain_replace_by_hand", "overriding_replace", "replace_by_hand"])
def test_a_replacement(worker: Worker, key: str, task: str, how: str) -> None:
    if "by_hand" in task and "group" in how:
        pytest.skip("Celery's own `replace` makes a chord of it; by hand nothing does")
    worker.wait(worker.send(task, how, key), ended="IGNORED")
    said = heard(worker, key, CANVASES[how])
    rows = ["replaced"] if task == "overriding_replace" else []
    assert said["last"] == rows


@pytest.mark.parametrize(("task", "link"), [("succeeds", "link"), ("fails", "link_error")])
def test_what_follows_a_task_that_runs_eagerly_in_a_block(worker: Worker, key: str, task: str, link: str) -> None:
    worker.call("eager_in_a_block", task, key)
    assert heard(worker, key, 1) == {link: []}


def test_what_an_eager_replacement_sends_is_its_own_codes(worker: Worker, watched_key: str) -> None:
    worker.call("run_eagerly", "replaced_by_a_block", watched_key)
    said: list[object] = []
    eventually(lambda: said.extend(worker.said(watched_key)) or len(said) >= 2, "it is published and arrives")
    if "outbox" in worker.name:  # it is captured in the transaction, and published after it
        assert [one for one in said if isinstance(one, list)] == [["sent", ["row"]]]
    else:
        assert [one["rows"] for one in said if isinstance(one, dict)] == [["row"]]


def test_a_rollback_leaves_no_lock(worker: Worker, key: str) -> None:
    assert worker.call("send_once", key, "raise").error == "Boom"
    assert worker.call("send_once", key, "return").state == "SUCCESS"
    assert heard(worker, key, 1) == {"once": ["row"]}


def test_chain_chord_and_links_of_the_client(worker: Worker, key: str) -> None:
    """They are sent by the tracer, when the task has left its unit of work."""
    worker.send_chain(
        worker.signature("block_that_sends", key), worker.signature("hear", "next", key), worker.signature("fails", key)
    )
    assert heard(worker, key, 2) == {"sent": ["row"], "next": ["row"]}
