"""The baselines are right where their users rely on them, and are seen to be broken where they are."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import URL, Engine, create_engine, select
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from support import loadworkers as load
from support.worker import Site

from celery_alchemy.loadtests.faults.tasks import FAULT_TASKS
from celery_alchemy.loadtests.services import harness
from celery_alchemy.loadtests.services.environment import WorkerEnvironment
from celery_alchemy.loadtests.tasks import observation
from celery_alchemy.loadtests.tasks.models import Account, Base, Entry
from celery_alchemy.loadtests.tasks.patterns import AWAITED, OURS, PATTERNS
from celery_alchemy.loadtests.tasks.workloads import PREFLIGHT, TASKS, WORKLOADS

NUMBERS = range(10)
SHARED = "its Session is in use by another task"
INHERITED = "its Session was in a transaction already"
READ = "its Session held objects that another task had read"
PENDING = "its Session held objects of another task, yet to be written"

#: Where each baseline is right, and with which workloads.
RIGHT = [
    *((pattern, pool) for pattern in ("with_session", "null_pool", "tuned", "thread_local", "flask") for pool in
      ("prefork", "threads", "gevent")),
    ("process_init", "prefork"),
    ("process_init", "solo"),
    ("global_session", "prefork"),
    ("recipe", "prefork"),
]  # fmt: skip


@pytest.fixture(scope="module")
def bench(postgresql_server: URL, site: Site) -> Iterator[load.Bench]:
    url = postgresql_server.render_as_string(hide_password=False)
    with harness.services(url, site.urls.celery) as found:
        yield found


def breaches(tasks: list[load.Ended]) -> set[str]:
    return {reply.breach for task in tasks for reply in task.replies} - {""}


# -- right and wrong on real workers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("pattern", "pool"), RIGHT, ids=["-".join(pair) for pair in RIGHT])
def test_a_baseline_is_right_where_its_users_rely_on_it(bench: load.Bench, pattern: str, pool: str) -> None:
    with load.load_worker(bench, pool, pattern, concurrency=1 if pool == "solo" else 3) as worker:
        for name, workload in WORKLOADS.items():
            if (pattern, name) != ("recipe", "mix"):
                load.assert_right(worker, workload, worker.call(workload, NUMBERS))


@pytest.mark.parametrize("pattern", [name for name, pattern in PATTERNS.items() if pattern.worker])
def test_another_framework_does_the_same_work_on_the_same_queue(bench: load.Bench, pattern: str) -> None:
    """Except what it has not, or what would stop its event loop."""
    [pool] = PATTERNS[pattern].pools
    with load.load_worker(bench, pool, pattern, concurrency=4) as worker:
        for name, workload in WORKLOADS.items():
            if PATTERNS[pattern].runs(pool, name):
                load.assert_right(worker, workload, worker.call(workload, NUMBERS))
        load.assert_right(worker, PREFLIGHT, worker.call(PREFLIGHT, [0]))


@pytest.mark.parametrize("pattern", ["recipe", "global_session"])
@pytest.mark.parametrize("pool", ["threads", "gevent"])
def test_a_session_that_tasks_share_is_seen(bench: load.Bench, pattern: str, pool: str) -> None:
    """Each of these tasks keeps its Session for 50 ms."""
    with load.load_worker(bench, pool, pattern, concurrency=4) as worker:
        tasks = worker.send(WORKLOADS["slow_io"], range(8))
        worker.ended(tasks, enough=lambda: SHARED in breaches(tasks))


def test_a_session_that_a_retry_leaves_to_the_next_task_is_seen(bench: load.Bench) -> None:
    """The recipe closes in after_return, which Celery does not call for a retry: both attempts are committed."""
    mix = WORKLOADS["mix"]
    with load.load_worker(bench, "prefork", "recipe", concurrency=1) as worker:
        [task] = worker.call(mix, [1])
        assert breaches([task]) == {INHERITED}
        assert worker.ledger()[task.task_id] == sorted(mix.expected_entries(1) * 2)


@pytest.mark.parametrize(
    ("pattern", "pool", "error"),
    [
        ("with_session", "gevent", None),
        (OURS, "gevent", None),
        ("with_session", "eventlet", "HubBlocked"),
        (OURS, "eventlet", None),
        ("with_session", "threads", None),
    ],
)
def test_preflight_tells_whether_the_driver_blocks_the_hub(
    bench: load.Bench, pattern: str, pool: str, error: str | None
) -> None:
    """psycopg 3 knows gevent, and takes eventlet for no hub at all unless it is told."""
    with load.load_worker(bench, pool, pattern, concurrency=2) as worker:
        [task] = worker.call(PREFLIGHT, [0])
        assert task.final[0].error_type == error, task


# -- what a baseline does not get from us ----------------------------------------------------------------------------

LOAD = """
import json, os, sys
from celery_alchemy.loadtests.tasks.app import app
app.loader.import_default_modules()
from celery_alchemy.strategies import interrupts
from celery_alchemy.strategies.engines import forks
from celery_alchemy.workers import apps
import celery.signals as signals
ours = [f.__module__ for name in signals.__all__ for _, f in getattr(signals, name).receivers or ()
        if getattr(f, "__module__", "").startswith(("celery_alchemy.workers", "celery_alchemy.strategies"))]
print(json.dumps({
    "alchemy": apps.find(app) is not None, "guarded": len(forks._pools), "registered": forks._registered,
    "signals": len(ours), "interrupts": len(interrupts._interrupt_types), "shield": interrupts.shield.installed,
    "wait": os.environ.get("PSYCOPG_WAIT_FUNC"), "steps": len(app.steps["worker"]),
    "tasks": sorted(name for name in app.tasks if name.startswith("celery_alchemy.loadtests.tasks.workloads.")),
}))
"""


def loaded(pattern: str) -> dict[str, Any]:
    broker = "redis://nowhere"
    environment = WorkerEnvironment("postgresql+psycopg://nobody@nowhere/nothing", broker, broker, pattern=pattern)
    done = subprocess.run(
        [sys.executable, "-c", LOAD],
        env=os.environ | environment.to_environ(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("pattern", [name for name, pattern in PATTERNS.items() if pattern.build])
def test_all_patterns_register_the_same_tasks_and_only_ours_has_an_alchemy(pattern: str) -> None:
    found = loaded(pattern)
    assert found.pop("tasks") == sorted(workload.task_name for workload in (*TASKS, *FAULT_TASKS))
    if pattern in {OURS, AWAITED}:
        assert found["alchemy"]
        assert found["signals"] > 0
    else:
        untouched = {"guarded": 0, "registered": False, "signals": 0, "interrupts": 0, "steps": 0}
        assert found == {"alchemy": False, "shield": False, "wait": None, **untouched}


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=lambda pattern: pattern.name)
def test_a_pattern_has_a_sentence(pattern: Any) -> None:
    assert pattern.summary.endswith(".")


# -- what counts as a breach -----------------------------------------------------------------------------------------


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        session.add(Account(id=1))
    yield engine
    engine.dispose()


def test_a_session_of_ones_own_is_no_breach(engine: Engine) -> None:
    with Session(engine) as session:
        assert observation.breach_of(session) == ""
        account = session.get_one(Account, 1)
        session.commit()
        # Held by somebody, but expired: who uses it next reads it anew.
        assert account in session
        assert observation.breach_of(session) == ""
    with Session(engine) as session, session.begin():
        assert observation.breach_of(session) == ""


def test_what_another_task_left_in_the_session_is_a_breach(engine: Engine) -> None:
    with Session(engine) as session:
        session.execute(select(Account.id))
        assert observation.breach_of(session) == INHERITED
    with Session(engine) as session:
        session.add(Entry(transfer_id="another's", account_id=1, amount=0))
        assert observation.breach_of(session) == PENDING
    with Session(engine, expire_on_commit=False) as session:
        account = session.get_one(Account, 1)
        session.commit()
        assert account in session
        assert observation.breach_of(session) == READ


def test_a_session_behind_a_proxy_is_known_again(engine: Engine) -> None:
    proxy = scoped_session(sessionmaker(engine))
    assert observation.session_behind(proxy) is observation.session_behind(proxy()) is proxy()
    proxy.remove()
