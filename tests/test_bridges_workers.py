"""The same pages in real workers: a failed task's rows are rolled back under prefork, threads and gevent."""

import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from celery import Celery
from support.databases import PostgreSQL
from support.docs import code_of, page_of
from support.waiting import eventually
from support.worker import Site, start_process, stop_process

#: What the worker needs beside the code on the page: a task that writes as those of the page do, and may fail.
ENDS = {
    "One module, and Flask's Engine": """
        User.__table__.name = "users"
        @app.task(base=DatabaseTask, name="write")
        def write(name, fails):
            with flask_app.app_context():
                db.session.add(User(name=name))
                db.session.flush()
            if fails:
                raise ZeroDivisionError
    """,
    "dishka": """
        @app.task(base=InjectedTask, name="write")
        def write(name, fails, session: FromDishka[Session]):
            session.execute(text("INSERT INTO users (name) VALUES (:name)"), {"name": name})
            if fails:
                raise ZeroDivisionError
    """,
    "wireup": """
        @app.task(base=DatabaseTask, name="write")
        @inject
        def write(name, fails, session: Injected[Session]):
            session.execute(text("INSERT INTO users (name) VALUES (:name)"), {"name": name})
            if fails:
                raise ZeroDivisionError
    """,
}


@pytest.fixture
def start(site: Site, run_database: PostgreSQL, tmp_path: Path) -> Iterator[Callable[[str, str], Celery]]:
    """Start a worker of the app in one section of the page; return a client of it."""
    with ExitStack() as stack:

        def start(section: str, pool: str) -> Celery:
            name = f"{site.prefix[:-1]}-{section}-{pool}"
            code = code_of(page_of(section), run_database.url(name), broker=site.urls.celery, title=section)
            code += f"""
app.conf.update(task_default_queue={name!r}, result_backend={site.urls.celery!r}, result_expires=60)
app.conf.broker_transport_options = app.conf.result_backend_transport_options = {{"global_keyprefix": {site.prefix!r}}}
"""
            ending = ENDS[section].splitlines()
            code += "\n".join(line[8:] for line in ending)
            (tmp_path / "shop.py").write_text(code)
            client = Celery("client", broker=site.urls.celery, backend=site.urls.celery, set_as_current=False)
            prefix = {"global_keyprefix": site.prefix}
            client.conf.update(broker_transport_options=prefix, result_backend_transport_options=prefix)
            client.conf.task_default_queue = name
            command = [sys.executable, "-m", "celery", "-A", "shop", "worker", "-P", pool, "-c", "4", "-l", "info"]
            command += ["--without-gossip", "--without-mingle", "--without-heartbeat", "-n", f"{name}@here"]
            process = start_process(command, tmp_path / "worker.log", {"PYTHONPATH": str(tmp_path)}, own=False)
            stack.callback(client.close)
            stack.callback(stop_process, process)
            eventually(lambda: _is_ready(process, tmp_path / "worker.log"), "the worker is ready", within_s=40)
            return client

        yield start


def _is_ready(process: "subprocess.Popen[bytes]", log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    return log.exists() and " ready." in log.read_text()


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
@pytest.mark.parametrize("section", ENDS)
def test_a_failed_tasks_rows_are_rolled_back(
    start: Callable[[str, str], Celery], run_database: PostgreSQL, tmp_path: Path, section: str, pool: str
) -> None:
    client = start(section, pool)
    key = uuid.uuid4().hex[:8]
    results = [client.send_task("write", (f"{key} {number} {number % 2}", number % 2)) for number in range(20)]
    states = [result.get(timeout=30, propagate=False) for result in results]
    assert [isinstance(state, Exception) for state in states] == [False, True] * 10, (
        tmp_path / "worker.log"
    ).read_text()
    written = run_database.column("SELECT name FROM users WHERE name LIKE :key", key=f"{key}%")
    assert sorted(written) == sorted(f"{key} {number} 0" for number in range(0, 20, 2))
