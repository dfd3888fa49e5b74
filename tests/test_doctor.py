"""`celery alchemy doctor` against projects that are wrong on purpose, each in one way, and one that is right."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url
from support import databases, preloaded, servers
from support.databases import PostgreSQL
from support.pgbouncer import pgbouncer

from celery_alchemy.workers.doctor.reading.project import POOLS
from celery_alchemy.workers.doctor.rules.catalogue import CATALOGUE
from celery_alchemy.workers.doctor.static import examine_path
from celery_alchemy.workers.starting import detection

PROJECTS = Path(__file__).parent / "doctor"
SMALL = {"pool_size": 2, "max_overflow": 1}
Doctor = Callable[..., dict[str, Any]]


def call(
    url: str, project: str, *arguments: str, settings: dict[str, Any] | None = None, cwd: Path = PROJECTS
) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "celery", "-A", project, "alchemy", "doctor", *arguments]
    environment = {**os.environ, "DOCTOR_URL": url, "DOCTOR_SETTINGS": json.dumps(settings or {})}
    return preloaded.run(command, cwd=cwd, env=environment, timeout=250)


@pytest.fixture
def doctor(run_database: PostgreSQL) -> Doctor:
    """Run the doctor; return what it says as JSON, its findings by their code, and its exit code."""

    def run(project: str, *arguments: str, url: str = "", **settings: Any) -> dict[str, Any]:
        done = call(url or run_database.url("doctor"), project, "--json", *arguments, settings=settings)
        assert done.stdout.startswith("{"), done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        found["codes"] = {one["code"]: one for one in found["findings"] if one["level"] != "note"}
        found["notes"] = {one["code"]: one for one in found["findings"] if one["level"] == "note"}
        found["exit"] = done.returncode
        return found

    return run


def line(project: str, text: str) -> str:
    lines = (PROJECTS / f"{project}.py").read_text().splitlines()
    return f"{project}.py:{next(number for number, one in enumerate(lines, 1) if text in one)}"


@pytest.mark.parametrize("pool", POOLS)
def test_it_says_nothing_against_a_right_project(doctor: Doctor, pool: str) -> None:
    found = doctor("right", "--pool", pool, "--concurrency", "3")
    assert found["codes"] == {}
    assert found["exit"] == 0
    assert found["worker_pool"] == pool
    assert list(found["databases"]) == ["default", "reports"]
    assert set(found["notes"]) == {"connections"}


def test_it_knows_each_worker_pool() -> None:
    assert set(POOLS) == {*detection.POOLS}


@pytest.mark.parametrize(
    ("project", "code", "level", "at", "remedy"),
    [
        ("recipe", "session-on-task", "error", "self._session = SessionLocal()", "base=DatabaseTask of celery_alchemy"),
        ("global_session", "global-session", "error", "session = Session(", "db.session"),
        ("engine_at_import", "engine-at-import", "error", "with engine.connect()", "dispose(close=False)"),
        ("guarded_engine", "engine-at-import", "note", "with engine.connect()", "dispose(close=False)"),
        ("commit_in_signal", "commit-in-signal", "error", "db.session.commit()", "Commit in the task"),
        ("commit_in_hook", "commit-in-hook", "error", "self.session.commit()", "Commit in the task"),
        ("sends_before_commit", "sends-before-commit", "warning", "welcome.delay(name)", "delay_on_commit"),
        ("flat_tasks", "session-on-task", "error", "self.session = flat_database", "base=DatabaseTask"),
        ("flat_tasks", "commit-in-signal", "error", "sender.session.commit()", "Commit in the task"),
        ("own_scoped_session", "scoped-session", "warning", "DBSession = scoped_session", "db.share(DBSession)"),
    ],
)
def test_patterns_in_the_code_are_found_at_their_line(
    doctor: Doctor, project: str, code: str, level: str, at: str, remedy: str
) -> None:
    found = doctor(project, "--no-connect")
    one = {**found["codes"], **found["notes"]}[code]
    assert one["level"] == level
    file, _, text_ = at.rpartition(".py: ")
    assert one["where"].endswith(line(file or project, text_))
    assert remedy in one["remedy"]
    assert found["exit"] == (1 if level == "error" or "error" in {f["level"] for f in found["codes"].values()} else 0)
    expected = {"flat_tasks": {"session-on-task", "commit-in-signal"}}.get(
        project, {code} if level != "note" else set()
    )
    assert set(found["codes"]) == expected, "and nothing else"


def test_what_waits_outside_tasks(doctor: Doctor) -> None:
    """Each function that does is named once; what a task may call, and what says what it waits for, is left alone."""
    lines = (PROJECTS / "on_commit_outside.py").read_text().splitlines()
    wrong = {number for number, one in enumerate(lines, 1) if "# too early" in one}
    found = [one for one in doctor("on_commit_outside", "--no-connect")["findings"] if one["level"] != "note"]
    assert {one["code"] for one in found} == {"on-commit-outside"}
    assert sorted(int(one["where"].rpartition(":")[2]) for one in found) == sorted(wrong)
    for settings in ({"alchemy_on_commit_outside": "send"}, {"doctor_shares": True}):
        assert doctor("on_commit_outside", "--no-connect", **settings)["codes"] == {}


def test_what_a_task_leaves_on_its_connection(doctor: Doctor) -> None:
    """Each line that does is named once; what ends with the transaction is left alone, and so is a listener."""
    lines = (PROJECTS / "session_state.py").read_text().splitlines()
    wrong = {number for number, one in enumerate(lines, 1) if "# stays" in one}
    found = doctor("session_state", "--no-connect")
    assert set(found["codes"]) == {"session-state"}
    stays = [one for one in found["findings"] if one["code"] == "session-state"]
    assert sorted(int(one["where"].rpartition(":")[2]) for one in stays) == sorted(wrong)
    assert all("alchemy_reset_on_return" in one["remedy"] for one in stays)
    assert found["exit"] == 0
    assert doctor("session_state", "--no-connect", alchemy_reset_on_return=True)["codes"] == {}


@pytest.mark.parametrize(
    ("settings", "arguments", "code", "words"),
    [
        ({"alchemy_engine_option": {}}, [], "configuration", "Did you mean 'alchemy_engine_options'"),
        ({"alchemy_database_url": "postgresql+asyncpg://h/x"}, [], "configuration", "names the async driver"),
        ({"alchemy_session_strategy": "scopd"}, [], "configuration", "Did you mean 'scoped'"),
        ({"worker_pool": "gevent"}, [], "configuration", "not monkey patched"),
        ({"alchemy_database_url": "postgresql+psycopg://u:secret@127.0.0.1:1/x"}, [], "unreachable", "cannot be asked"),
        ({"alchemy_engine_options": {"isolation_level": "AUTOCOMMIT"}}, [], "autocommit", "commits itself"),
        ({"alchemy_engine_options": {"poolclass": "NullPool"}}, [], "null-pool", "anew for each task"),
        ({"alchemy_engine_options": SMALL}, ["-P", "threads", "-c", "9"], "tasks-queue", "3 connections"),
        ({"alchemy_engine_options": {"max_overflow": -1}}, [], "no-limit", "sets no limit"),
        ({"task_reject_on_worker_lost": False}, [], "lost-when-killed", "nobody runs it again"),
        ({"shop_time_limit": 7200}, [], "runs-twice", "visibility_timeout (3600 s)"),
        ({}, ["--hosts", "5000", "-c", "4"], "too-many-connections", "5000 workers x 5 processes x 2 connections"),
    ],
)  # fmt: skip
def test_settings_are_put_in_their_place(
    doctor: Doctor, settings: dict[str, Any], arguments: list[str], code: str, words: str
) -> None:
    found = doctor("settings", *arguments, **settings)
    assert set(found["codes"]) - {"no-limit"} <= {code}
    one = found["codes"][code]
    assert words in one["what"]
    assert one["remedy"]
    assert "secret" not in json.dumps(found)
    assert found["exit"] == (1 if one["level"] == "error" else 0)


BIG = {"pool_size": 20, "max_overflow": 0}


@pytest.mark.parametrize(
    ("pool", "main", "other", "code", "words"),
    [
        ("gevent", {}, BIG, "tasks-queue", "the Engine of 'default' has 15 connections, and 20 are enough"),
        ("eventlet", {}, BIG, "tasks-queue", "has 15 connections"),
        ("gevent", BIG, {}, "tasks-queue", "the Engine of `binds`"),
        ("threads", BIG, {"pool_size": 100}, "tasks-queue", "the Engine of 'default' has 20 connections:"),
        ("prefork", {"poolclass": "NullPool"}, {}, "null-pool", "anew for each task"),
        ("gevent", BIG, BIG, "", ""),
        ("gevent", {"max_overflow": -1}, BIG, "no-limit", "sets no limit"),
    ],
)
def test_an_engine_that_is_given_has_as_many_connections_as_tasks_need(
    doctor: Doctor, pool: str, main: dict[str, Any], other: dict[str, Any], code: str, words: str
) -> None:
    found = doctor("given_engine", "--no-connect", "-P", pool, "-c", "100", main=main, other=other)
    assert set(found["codes"]) - {"no-limit"} == {code} - {"", "no-limit"}
    assert not code or words in found["codes"][code]["what"]


@pytest.fixture
def allowed(run_database: PostgreSQL) -> int:
    """The connections the server of this run allows, those reserved for superusers among them."""
    return int(run_database.column("SHOW max_connections")[0])


def test_little_may_be_left_for_others(doctor: Doctor, allowed: int) -> None:
    workers = 9 * allowed // 100  # of 10 connections each
    found = doctor("settings", "--workers", str(workers), "-c", "4")
    assert set(found["codes"]) == {"few-connections-left"}
    assert f"{10 * workers} of the" in found["codes"]["few-connections-left"]["what"]
    assert found["exit"] == 0


def test_without_an_alchemy(doctor: Doctor) -> None:
    assert "has no Alchemy" in doctor("no_alchemy")["codes"]["no-alchemy"]["what"]


def test_an_unknown_database(doctor: Doctor) -> None:
    assert "'reports' is not a database" in doctor("unknown_database")["codes"]["configuration"]["what"]


def test_the_outbox_needs_its_table(doctor: Doctor, postgresql_server: Any, run_name: str) -> None:
    assert doctor("settings", alchemy_outbox=True)["codes"] == {}
    with databases.new_postgresql(postgresql_server, f"{run_name}_bare") as bare:
        bare.execute("DROP TABLE celery_alchemy_outbox")
        found = doctor("settings", url=bare.url("doctor"), alchemy_outbox=True)
    assert "outbox_table(Base.metadata)" in found["codes"]["outbox-table"]["remedy"]
    assert found["exit"] == 1


def test_two_phase_needs_a_server_that_prepares(doctor: Doctor, run_database: PostgreSQL) -> None:
    both = {"alchemy_databases": {"reports": run_database.url("doctor")}, "alchemy_two_phase": True}
    found = doctor("settings", **both)
    if run_database.column("SHOW max_prepared_transactions") == ["0"]:
        assert "max_prepared_transactions" in found["codes"]["two-phase"]["remedy"]
    else:
        assert found["codes"] == {}


@pytest.fixture
def full_url(run_database: PostgreSQL, run_name: str) -> Iterator[str]:
    """A user whom the server allows no connection."""
    role = f"{run_name}_full"
    run_database.execute(f"CREATE ROLE \"{role}\" LOGIN PASSWORD 'secret' CONNECTION LIMIT 0")
    try:
        url = make_url(run_database.url("doctor")).set(username=role, password="secret")
        yield url.render_as_string(hide_password=False)
    finally:
        run_database.execute(f'DROP ROLE "{role}"')


def test_too_many_clients_is_told_as_that(doctor: Doctor, full_url: str) -> None:
    found = doctor("settings", url=full_url)
    assert set(found["codes"]) == {"too-many-clients"}
    one = found["codes"]["too-many-clients"]
    assert "has no connection left: " in one["what"]
    assert "pg_stat_activity" in one["remedy"]
    assert "secret" not in json.dumps(found)
    assert found["exit"] == 1


@pytest.mark.parametrize(
    "files",
    [
        ["recipe"],
        ["flat_tasks", "flat_database"],
        ["global_session"],
        ["engine_at_import"],
        ["commit_in_signal"],
        ["sends_before_commit"],
        ["own_scoped_session"],
    ],
    ids=lambda files: files[0],
)
def test_source_files_alone_say_the_same(run_database: PostgreSQL, files: list[str], tmp_path: Path) -> None:
    for name in files:
        (tmp_path / f"{name}.py").write_text((PROJECTS / f"{name}.py").read_text())
    done = call(run_database.url("doctor"), files[0], "--json", "--no-connect", cwd=tmp_path)
    with_app = [one for one in json.loads(done.stdout)["findings"] if one["code"] in CATALOGUE]
    alone = [asdict(one) for one in examine_path(tmp_path).findings]
    assert with_app
    assert alone == with_app


def test_databases_of_one_server_add_up(doctor: Doctor, run_database: PostgreSQL, allowed: int) -> None:
    two = {"alchemy_databases": {"reports": run_database.url("doctor")}}
    hosts = allowed // 30  # of 18 connections to each database: too many only together
    found = doctor("settings", "--hosts", str(hosts), "-c", "8", **two)
    said = found["codes"]["too-many-connections"]["what"]
    assert f"{36 * hosts} connections to the server of 'default' and 'reports'" in said


def test_a_pooler_that_the_app_does_not_know_of(
    doctor: Doctor, run_database: PostgreSQL, tmp_path_factory: pytest.TempPathFactory
) -> None:
    server = make_url(run_database.url("unused")).difference_update_query(["application_name"])
    with pgbouncer(server, tmp_path_factory.mktemp("doctor")) as pooled:
        url = pooled.render_as_string(hide_password=False)
        found = doctor("settings", url=url)
        assert "alchemy_external_pooler = 'pgbouncer'" in found["codes"]["pooler"]["remedy"]
        assert found["exit"] == 1
        assert doctor("settings", "--hosts", "100", url=url, alchemy_external_pooler="pgbouncer")["codes"] == {}
    assert set(doctor("settings", alchemy_external_pooler="pgbouncer")["codes"]) == {"no-pooler"}


@pytest.fixture
def mariadb(run_name: str) -> Iterator[databases.MariaDB]:
    with databases.new_mariadb(servers.mariadb(), f"{run_name}_doctor") as database:
        yield database


def test_mariadb(doctor: Doctor, mariadb: databases.MariaDB) -> None:
    assert doctor("settings", url=mariadb.url(""))["codes"] == {}
    slow = {"alchemy_engine_options": {"pool_recycle": 999_999}}
    assert "it comes too late" in doctor("settings", url=mariadb.url(""), **slow)["notes"]["recycle"]["what"]
    found = doctor("settings", "--hosts", "90000", url=mariadb.url(""))
    assert "max_connections" in found["codes"]["too-many-connections"]["what"]


def test_sqlite(doctor: Doctor, tmp_path: Path) -> None:
    found = doctor("settings", "-c", "4", url=f"sqlite:///{tmp_path}/shop.sqlite3")
    assert set(found["codes"]) == {"sqlite"}


def test_for_people(run_database: PostgreSQL) -> None:
    done = call(run_database.url("doctor"), "sends_before_commit", "-P", "threads", "-c", "4")
    assert done.returncode == 0, done.stderr
    assert "worker pool threads, concurrency 4" in done.stdout
    assert "session strategy scoped (auto: threads share one process" in done.stdout
    assert "1 workers x 1 processes x 8 connections = 8" in done.stdout
    assert (
        f"warning sends-before-commit [{PROJECTS}/{line('sends_before_commit', 'welcome.delay(name)')}]" in done.stdout
    )
    assert done.stdout.rstrip().endswith("0 errors, 1 warning")
    assert call(run_database.url("doctor"), "sends_before_commit", "--strict").returncode == 1


@pytest.mark.parametrize("arguments", [["--pool", "procesess"], ["--hosts", "0"], ["--concurrency", "many"]])
def test_bad_arguments(run_database: PostgreSQL, arguments: list[str]) -> None:
    done = call(run_database.url("doctor"), "right", *arguments)
    assert done.returncode == 2
    assert "Usage" in done.stderr or "Error" in done.stderr


def test_connections_of_tasks_that_only_read_are_counted(run_database: PostgreSQL, tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(
        "import os\n"
        "from celery import Celery\n"
        "from celery_alchemy import Alchemy, DatabaseTask\n"
        "app = Celery('shop', broker='memory://')\n"
        "app.conf.alchemy_database_url = os.environ['DOCTOR_URL']\n"
        "db = Alchemy(app)\n"
        "@app.task(base=DatabaseTask, read_only=True)\n"
        "def count(): ...\n"
    )
    done = call(run_database.url("doctor"), "shop", "-P", "threads", "-c", "4", cwd=tmp_path)
    assert "1 workers x 1 processes x 16 connections = 16" in done.stdout, done.stderr
