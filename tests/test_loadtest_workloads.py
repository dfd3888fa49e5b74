"""The workloads of the load tests do what checks and report say they do, on real workers of every pool."""

import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, QueuePool, create_engine
from sqlalchemy.orm import Session
from support import loadworkers as load
from support.waiting import eventually
from support.worker import Site

from celery_alchemy.loadtests.services import harness
from celery_alchemy.loadtests.tasks import phases
from celery_alchemy.loadtests.tasks.models import Base
from celery_alchemy.loadtests.tasks.patterns import PATTERNS, POOLS
from celery_alchemy.loadtests.tasks.replies import Outcome, ReplyList
from celery_alchemy.loadtests.tasks.workloads import (
    ACCOUNTS,
    PREFLIGHT,
    WAIT_S,
    WORKLOADS,
    Call,
    Ending,
    WrongResult,
    transfer_of,
)

NUMBERS = range(10)
MIX, TRANSFER = WORKLOADS["mix"], WORKLOADS["transfer"]


@pytest.fixture(scope="module")
def bench(postgresql_server: URL, site: Site) -> Iterator[load.Bench]:
    url = postgresql_server.render_as_string(hide_password=False)
    with harness.services(url, site.urls.celery) as found:
        yield found


@pytest.fixture(scope="module", params=POOLS)
def ours(request: pytest.FixtureRequest, bench: load.Bench) -> Iterator[load.LoadWorker]:
    """A worker with our pattern, one of each pool."""
    with load.load_worker(bench, request.param, concurrency=1 if request.param == "solo" else 3) as running:
        yield running


# -- what is known of a task before it runs ------------------------------------------------------------------------


def test_what_a_task_does_is_known_from_its_number() -> None:
    for number in range(2000):
        source, target, amount = transfer_of(number)
        assert source != target
        assert amount > 0
        assert TRANSFER.expected_entries(number) == sorted([(source, -amount), (target, amount)])
        for workload in WORKLOADS.values():
            entries = workload.expected_entries(number)
            assert sum(change for _, change in entries) == 0
            assert {account for account, _ in entries} <= set(range(1, ACCOUNTS + 1))
            assert bool(entries) == (workload.transactions > 0 and not workload.expected_error(number))


def test_transfers_meet_at_all_accounts_alike() -> None:
    met = Counter(account for number in range(5000) for account in transfer_of(number)[:2])
    assert min(met.values()) > 5000 * 2 / ACCOUNTS * 0.8


def test_of_ten_transfers_of_the_mix_three_end_in_their_own_way() -> None:
    endings = Counter(MIX.ending(number) for number in range(1000))
    assert endings == {Ending.RETURN: 700, Ending.COMMIT: 100, Ending.RAISE: 100, Ending.RETRY: 100}


def test_whoever_reads_the_definitions_needs_neither_the_app_nor_locust() -> None:
    script = (
        "import sys; import celery_alchemy.loadtests.tasks.workloads, celery_alchemy.loadtests.tasks.patterns; "
        "loaded = {'celery_alchemy.loadtests.tasks.app', 'locust', 'gevent', 'flask'} & set(sys.modules); "
        "sys.exit(f'loaded: {loaded}' if loaded else 0)"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LOADTEST")}
    done = subprocess.run([sys.executable, "-c", script], env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_task_that_finds_no_row_or_another_one_says_so() -> None:
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    for name in ("select", "transfer", "statements", "slow_io"):
        with Session(engine) as session, pytest.raises(WrongResult):
            WORKLOADS[name].body(session, Call("task", 1))
    engine.dispose()


# -- on real workers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_leaves_what_it_should(ours: load.LoadWorker, name: str) -> None:
    workload = WORKLOADS[name]
    tasks = ours.call(workload, NUMBERS)
    load.assert_right(ours, workload, tasks)
    for task in tasks:
        attempts = 2 if workload.ending(task.number) is Ending.RETRY else 1
        # In any order: another process may run the retry before the one that has sent it answers.
        assert [reply.outcome for reply in task.replies].count(Outcome.RETRY) == attempts - 1, task
        assert len(task.replies) == attempts, task


def test_replies_go_where_the_header_says(ours: load.LoadWorker) -> None:
    """Those of a retry too, which another process may run."""
    elsewhere = f"{ours.environment.queue}.elsewhere"
    load.assert_right(ours, MIX, ours.call(MIX, NUMBERS, reply_to=elsewhere))


def test_the_driver_does_not_block_the_hub_under_our_pattern(ours: load.LoadWorker) -> None:
    [task] = ours.call(PREFLIGHT, [0])
    assert task.final[0].outcome is Outcome.SUCCESS, task


def test_time_is_told_apart(ours: load.LoadWorker) -> None:
    """What the server takes is database time, what the task takes elsewhere is not."""
    waited_ms = WAIT_S * 1000 * 0.9  # a hub's timer may be a little early
    for task in ours.call(WORKLOADS["slow_query"], NUMBERS):
        assert task.final[0].database_ms >= waited_ms
    for task in ours.call(WORKLOADS["slow_io"], NUMBERS):
        run_ms = (task.final[0].ended - task.final[0].started) * 1000
        assert task.final[0].database_ms <= run_ms - waited_ms


def test_connections_are_promised_for_baselines_too(bench: load.Bench) -> None:
    for pattern, concurrency, promised in (("with_session", 2, 2 * 15), ("null_pool", 2, 2 * 2), ("tuned", 2, 2)):
        with load.load_worker(bench, "prefork", pattern, concurrency=concurrency) as worker:
            assert worker.worker.max_connections == promised
            assert worker.worker.strategy == ""
    assert PATTERNS["tuned"].connections(100) == 20


THEIRS = """
import os
from celery import Celery
from sqlalchemy import text

from celery_alchemy import Alchemy, DatabaseTask

app = Celery("theirs", broker=os.environ["THEIR_BROKER"])
app.conf.update(
    alchemy_database_url=os.environ["THEIR_DATABASE"], task_default_queue=os.environ["THEIR_QUEUE"],
    task_create_missing_queues=True, worker_enable_remote_control=False, task_ignore_result=True,
)
if app.conf.broker_url.startswith("redis"):
    keys = ("unacked", "unacked_index", "unacked_mutex")
    app.conf.broker_transport_options = {f"{key}_key": f"{os.environ['THEIR_QUEUE']}.{key}" for key in keys}
db = Alchemy(app)


@app.task(base=DatabaseTask, bind=True, name="theirs.look")
def look(self):
    self.db.execute(text("SELECT pg_sleep(0.05)"))
"""


def test_a_users_worker_answers_for_tasks_with_the_header_only(bench: load.Bench, tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(THEIRS)
    theirs = {
        "THEIR_BROKER": bench.broker.url,
        "THEIR_DATABASE": bench.server.url.render_as_string(hide_password=False),
        "THEIR_QUEUE": f"celery-alchemy-{bench.run.id}-theirs",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])),
    }
    options = {"app": "theirs", "app_environ": theirs, "queue": theirs["THEIR_QUEUE"], "concurrency": 1}
    with load.load_worker(bench, "prefork", **options) as worker:
        assert worker.worker.strategy == "per_process"
        elsewhere = f"{worker.environment.queue}.elsewhere"
        worker.send_named("theirs.look")
        sent = [worker.send_named("theirs.look", reply_to=elsewhere) for _ in range(4)]
        for task in worker.ended(sent, elsewhere):
            assert task.final[0].database_ms >= 50
        default = ReplyList(worker.environment.reply_url, worker.environment.reply_key)
        assert list(default.pop(timeout_s=0.1)) == []
        default.close()


# -- the measurement itself ------------------------------------------------------------------------------------------


def test_connecting_is_checkout_time_and_nothing_else(postgresql_server: URL) -> None:
    engine = phases.instrument(create_engine(postgresql_server))
    measurement = phases.begin()
    with engine.connect() as connection:
        assert measurement.checkout_s > 0
        # SQLAlchemy has asked the server a few things.
        assert measurement.database_s == 0
        connection.exec_driver_sql("SELECT 1")
        assert measurement.database_s > 0
    engine.dispose()


def test_waiting_for_a_connection_is_checkout_time() -> None:
    engine = phases.instrument(
        create_engine("sqlite://", poolclass=QueuePool, pool_size=1, max_overflow=0, pool_timeout=10)
    )
    held = engine.connect()
    seen: list[Any] = []

    def wait() -> None:
        seen.append(phases.begin())
        with engine.connect():
            pass

    waiting = threading.Thread(target=wait)
    waiting.start()
    eventually(lambda: seen, "the thread has begun")
    pause_s = 0.1
    threading.Event().wait(pause_s)
    assert phases.checked_out() == 1
    held.close()
    waiting.join()
    # The thread may have been slow to begin to wait, but hardly as slow as this.
    assert seen[0].checkout_s > pause_s / 10
    assert phases.checked_out() == 0
    engine.dispose()


def test_an_engine_is_instrumented_once() -> None:
    engine = create_engine("sqlite://")
    once = phases.instrument(engine).raw_connection
    assert phases.instrument(engine).raw_connection is once
