"""Two-phase commit: all databases commit, or none; whatever is killed, and wherever."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url, text
from support import databases, everywhere, servers
from support.apps import Isolated
from support.databases import Database, PostgreSQL
from support.faults import amount
from support.project.models import Child, Row
from support.several import MODULES, settings
from support.waiting import eventually
from support.worker import TESTS, Site, Worker, running

from celery_alchemy import Alchemy, ConfigurationError
from celery_alchemy.loadtests.errors import ServiceError
from celery_alchemy.loadtests.postgresql import embedded_postgresql
from celery_alchemy.loadtests.proxy import counting_proxy
from celery_alchemy.loadtests.rundir import run_directory
from celery_alchemy.strategies.several import in_doubt

#: prepare the decider, prepare the other, commit the decider, commit the other
STEPS = 4


@pytest.fixture(scope="module")
def preparing() -> Iterator[Any]:
    """A PostgreSQL server that prepares transactions: by default none does."""
    with contextlib.ExitStack() as stack:
        try:
            url = stack.enter_context(embedded_postgresql(stack.enter_context(run_directory())))
        except ServiceError as error:
            pytest.skip(str(error))
        yield url


@pytest.fixture(scope="module")
def here(preparing: Any) -> Iterator[PostgreSQL]:
    with databases.new_postgresql(preparing, "here") as database:
        yield database


@pytest.fixture(scope="module")
def beside(preparing: Any) -> Iterator[PostgreSQL]:
    """On the same server as `here`."""
    with databases.new_postgresql(preparing, "beside") as database:
        yield database


@pytest.fixture(scope="module")
def elsewhere(run_name: str) -> Iterator[databases.MariaDB]:
    with databases.new_mariadb(servers.mariadb(), f"{run_name}_two_phase") as database:
        yield database


PAIRS = [("here", "beside"), ("here", "elsewhere"), ("elsewhere", "here")]


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request: pytest.FixtureRequest) -> tuple[Database, Database]:
    first, second = (request.getfixturevalue(name) for name in request.param)
    return first, second


@contextlib.contextmanager
def app_with(first: str, second: str, **more: Any) -> Iterator[Alchemy]:
    app = Isolated("two", broker="memory://", set_as_current=False)
    more = everywhere.SETTINGS | more
    app.conf.update(alchemy_database_url=first, alchemy_databases={"reports": second}, alchemy_two_phase=True, **more)
    db = Alchemy(app)
    try:
        yield db
    finally:
        for one in db.databases.values():
            one.stop()


def write_both(db: Alchemy, key: str, *, fails: str = "") -> None:
    with db.unit_of_work() as session:
        for name, used in (("default", session), ("reports", db.databases["reports"].session())):
            used.add(Row(key=key, note="written"))
            used.flush()
            if name == fails:
                used.add(Child(parent_id=-1))


def test_both_commit(pair: tuple[Database, Database], key: str) -> None:
    with app_with(pair[0].url("two"), pair[1].url("two")) as db:
        write_both(db, key)
        assert [database.rows(key) for database in pair] == [["written"]] * 2
        assert in_doubt.find({name: one.engine for name, one in db.databases.items()}) == []


@pytest.mark.parametrize("fails", ["default", "reports"])
def test_a_commit_that_one_refuses_is_none(here: PostgreSQL, beside: PostgreSQL, key: str, fails: str) -> None:
    """A deferred constraint is checked when the transaction is prepared."""
    with app_with(here.url("two"), beside.url("two")) as db:
        with pytest.raises(Exception, match="children_parent_id_fkey"):
            write_both(db, key, fails=fails)
        assert [here.rows(key), beside.rows(key)] == [[], []]
        assert here.column("SELECT gid FROM pg_prepared_xacts") == []
        write_both(db, key)
        assert [here.rows(key), beside.rows(key)] == [["written"]] * 2


def commit_and_die(urls: list[str], key: str, first: str, step: int) -> "subprocess.CompletedProcess[str]":
    host = [sys.executable, str(Path(__file__).parent / "scripts" / "two_phase_host.py"), *urls, key, first, str(step)]
    found = {"PYTHONPATH": str(TESTS)}
    return subprocess.run(host, capture_output=True, text=True, timeout=60, cwd=TESTS, env=found, check=False)


@pytest.mark.parametrize("first", ["default", "reports", "default reads", "reports reads"])
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_killed_between_any_two_steps_both_are_committed_or_none(
    pair: tuple[Database, Database], key: str, first: str, step: int
) -> None:
    urls = [database.url("two") for database in pair]
    ended = commit_and_die(urls, key, first, step)
    first, _, reads = first.partition(" ")
    other = "reports" if first == "default" else "default"
    died = [f"prepare {first}", f"prepare {other}", f"commit {first}", f"commit {other}"][step - 1]
    assert ended.stdout == f"{died}\n", ended.stderr
    with app_with(*urls) as db:
        engines = {name: one.engine for name, one in db.databases.items()}
        eventually(lambda: len(in_doubt.find(engines)) == [0, 1, 2, 1][step - 1], "the server has noticed")
        for one in in_doubt.find(engines):
            in_doubt.resolve(engines, one)
        assert in_doubt.find(engines) == []
    expected = {first: [], other: []}
    if step == STEPS:
        expected = {first: [] if reads else ["written"], other: ["written"]}
    assert {"default": pair[0].rows(key), "reports": pair[1].rows(key)} == expected


@pytest.mark.parametrize("how", ["timeout", "kill"])
def test_interrupted_at_any_moment_both_are_committed_or_none(
    pair: tuple[Database, Database], key: str, how: str
) -> None:
    """The process lives on: what it does not know the end of, it leaves to in_doubt."""
    urls = [database.url("two") for database in pair]
    script = str(Path(__file__).parent / "scripts" / "two_phase_storm.py")
    command = [sys.executable, script, *urls, key, str(amount(200, 3000)), how]
    found = {"PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=TESTS, env=found, check=False)
    assert done.stdout == "ended\n", done.stderr
    with app_with(*urls) as db:
        engines = {name: one.engine for name, one in db.databases.items()}
        for _ in range(3):
            time.sleep(1)  # what was under way when its connection was closed may still arrive
            for one in in_doubt.find(engines):
                in_doubt.resolve(engines, one)
        assert in_doubt.find(engines) == []
    here, there = (sorted(database.rows(key)) for database in pair)
    assert here == there
    assert {"-1", "-2"} <= set(here)
    assert len(here) < amount(200, 3000) + 2, "some were interrupted"


def test_what_belongs_to_another_app_is_left_alone(here: PostgreSQL, beside: PostgreSQL, key: str) -> None:
    """Its decider is another database than ours of the same name."""
    with here.engine.connect() as connection:
        connection.execute(text("BEGIN"))
        connection.execute(text("INSERT INTO rows_ (key_, note) VALUES (:key, 'other')"), {"key": key})
        connection.execute(text("PREPARE TRANSACTION 'alchemy/default/abcdef/default/0'"))
    try:
        with app_with(here.url("two"), beside.url("two")) as db:
            assert in_doubt.find({name: one.engine for name, one in db.databases.items()}) == []
    finally:
        here.execute("ROLLBACK PREPARED 'alchemy/default/abcdef/default/0'")


def test_one_database_alone_pays_for_no_second_phase(here: PostgreSQL, beside: PostgreSQL, key: str) -> None:
    with (
        counting_proxy(make_url(here.url("two"))) as proxy,
        app_with(proxy.url.render_as_string(hide_password=False), beside.url("two")) as db,
    ):
        costs = []
        for explicit in (False, False, True):
            before = proxy.round_trips
            with db.unit_of_work() as session:
                session.execute(text("INSERT INTO rows_ (key_, note) VALUES (:key, 'one')"), {"key": key})
                if explicit:
                    session.commit()
            costs.append(proxy.round_trips - before)
        assert costs[1:] == [3, 3], "BEGIN, INSERT, COMMIT"
        assert here.rows(key) == ["one"] * 3


def test_a_database_without_two_phases_commits_between_them(here: PostgreSQL, tmp_path: Path, key: str) -> None:
    with databases.new_sqlite(tmp_path / "two.sqlite3") as file, app_with(file.url(""), here.url("two")) as db:
        write_both(db, key)
        assert [here.rows(key), file.rows(key)] == [["written"]] * 2
        file.execute("CREATE TRIGGER no BEFORE INSERT ON users BEGIN SELECT RAISE(ABORT, 'refused'); END")
        with pytest.raises(Exception, match="refused"), db.unit_of_work() as session:
            db.databases["reports"].session.add(Row(key=key, note="must not be there"))
            db.databases["reports"].session.flush()
            session.execute(text("INSERT INTO users (name) VALUES ('x')"))
        assert here.rows(key) == ["written"]


def test_two_databases_without_two_phases_are_refused(site: Site, here: PostgreSQL, tmp_path: Path) -> None:
    worker = Worker(
        site, "refused", "solo", database_url=f"sqlite:///{tmp_path}/a", modules=MODULES,
        settings={"alchemy_databases": {"reports": f"sqlite:///{tmp_path}/b"}, "alchemy_two_phase": True},
    )  # fmt: skip
    worker.start()
    eventually(lambda: not worker.is_running(), "it has ended", within_s=30)
    worker.stop()
    assert worker.exit_code()
    assert "'default' and 'reports' cannot prepare a transaction" in worker.log()


def test_a_server_that_prepares_nothing_says_so(run_database: PostgreSQL, there: PostgreSQL, key: str) -> None:
    if run_database.column("SHOW max_prepared_transactions") != ["0"]:
        pytest.skip("this server prepares transactions")
    with app_with(run_database.url("two"), there.url("two")) as db:
        with pytest.raises(Exception, match="Set max_prepared_transactions"):
            write_both(db, key)
        assert [run_database.rows(key), there.rows(key)] == [[], []]


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "eventlet", "solo"])
def test_under_every_worker_pool(site: Site, here: PostgreSQL, beside: PostgreSQL, key: str, pool: str) -> None:
    name = f"{site.prefix[:-1]}-two-{pool}"
    both = settings(beside) | {"alchemy_two_phase": True}
    worker = Worker(site, name, pool, database_url=here.url(name), modules=MODULES, settings=both)
    with running(worker):
        for ending in ("returns", "raises", "commit fails here", "commit fails there", "retry", "broken there"):
            outcome = worker.call("end_both", f"{key[:20]}-{ending}", ending)
            assert outcome.state == ("SUCCESS" if ending in {"returns", "retry"} else "FAILURE"), outcome
            kept = ending == "returns"
            assert here.rows(f"{key[:20]}-{ending}") == (["here"] if kept else [])
            assert beside.rows(f"{key[:20]}-{ending}") == (["there"] if kept else [])
        assert "a unit of work commits all or none (two-phase)" in worker.log()
        assert here.column("SELECT gid FROM pg_prepared_xacts") == []
        databases.assert_not_busy(here, name)


def test_the_command_lists_and_resolves(here: PostgreSQL, beside: PostgreSQL, key: str, tmp_path: Path) -> None:
    urls = [here.url("two"), beside.url("two")]
    commit_and_die(urls, key, "default", STEPS)
    (tmp_path / "shop.py").write_text(
        "from celery import Celery\nfrom celery_alchemy import Alchemy\n"
        f"app = Celery('shop', broker='memory://')\napp.conf.update(alchemy_database_url={urls[0]!r},"
        f" alchemy_databases={{'reports': {urls[1]!r}}}, alchemy_two_phase=True)\ndb = Alchemy(app)\n"
    )
    command = [sys.executable, "-m", "celery", "-A", "shop", "alchemy", "in-doubt", "--wait-s", "0.2"]

    def run(*more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([*command, *more], capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)

    assert (here.rows(key), beside.rows(key)) == (["written"], [])
    listed = run()
    assert listed.returncode == 1, listed
    assert "reports: alchemy/default/" in listed.stdout
    assert "to be committed" in listed.stdout
    assert "--resolve" in listed.stderr
    assert run("--resolve").returncode == 0
    assert beside.rows(key) == ["written"]
    assert "nothing in doubt" in run().stdout


def test_bad_settings() -> None:
    app = Isolated("bad", broker="memory://", set_as_current=False)
    app.conf.update(alchemy_database_url="sqlite://", alchemy_two_phase="yes")
    with pytest.raises(ConfigurationError, match="alchemy_two_phase is 'yes', but it must be True or False"):
        Alchemy(app).settings  # noqa: B018
