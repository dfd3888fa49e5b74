"""Two-phase commit: all databases commit, or none; whatever is killed, and wherever."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import make_url, text
from support import databases, preloaded
from support.databases import Database, PostgreSQL
from support.faults import amount
from support.two_phase import STEPS, Host, app_with, commit_and_die, decided_by, engines_of, resolve_all, steps
from support.waiting import eventually
from support.worker import TESTS

from celery_alchemy.loadtests.services.proxy import CountingProxy
from celery_alchemy.strategies.errors import NotEnded
from celery_alchemy.strategies.several import in_doubt


@pytest.mark.parametrize("first", ["default", "reports", "default reads", "reports reads"])
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_killed_between_any_two_steps_both_are_committed_or_none(
    pair: tuple[Database, Database], tmp_path: Path, key: str, first: str, step: int
) -> None:
    urls = [database.url("two") for database in pair]
    ended = commit_and_die(tmp_path, urls, key, first, step)
    first, _, reads = first.partition(" ")
    other = "reports" if first == "default" else "default"
    died = steps(pair, first, other)[step - 1]
    assert ended[0] == f"{died}\n", ended[1]
    with app_with(*urls) as db:
        engines = {name: one.engine for name, one in db.databases.items()}
        eventually(lambda: len(in_doubt.find(engines)) == [0, 1, 2, 1][step - 1], "the server has noticed")
        assert resolve_all(engines) == []
        assert in_doubt.find(engines) == []
    expected = {first: [], other: []}
    if step >= decided_by(pair, first):
        expected = {first: [] if reads else ["written"], other: ["written"]}
    assert {"default": pair[0].rows(key), "reports": pair[1].rows(key)} == expected


@pytest.mark.parametrize(
    ("step", "resolving"),
    [*((step, "two at once") for step in range(1, STEPS + 1)), (3, "first one"), (3, "last one"), (4, "last one")],
)
def test_resolved_while_its_worker_is_alive_both_are_committed_or_none(
    pair: tuple[Database, Database], tmp_path: Path, key: str, step: int, resolving: str
) -> None:
    """The worker is stopped between any two steps, and goes on when others have resolved what it has prepared: two at
    once, or one that was killed when it had ended a single transaction. It tells the truth."""
    urls = [database.url("two") for database in pair]
    with app_with(*urls) as db:
        worker = Host(tmp_path, urls, key, "default", step, "STOP")
        try:
            assert worker.line() == f"{steps(pair, 'default', 'reports')[step - 1]}\n"
            engines = {name: one.engine for name, one in db.databases.items()}
            if resolving == "two at once":
                with ThreadPoolExecutor(2) as resolvers:
                    for done in [resolvers.submit(resolve_all, engines) for _ in range(2)]:
                        with contextlib.suppress(NotEnded):  # the server lets one of them at it at a time
                            done.result()
            else:
                for one in in_doubt.find(engines)[slice(1) if resolving == "first one" else slice(-1, None)]:
                    in_doubt.resolve(engines, one)
        finally:
            worker.process.send_signal(signal.SIGCONT)
        said, errors = worker.rest()
        eventually(lambda: resolve_all(engines) == [], "all is resolved")
        assert in_doubt.find(engines) == []
    rows = [database.rows(key) for database in pair]
    assert rows in ([[], []], [["written"], ["written"]])
    assert said == ("ended\n" if rows[0] else "failed: RolledBackElsewhere\n"), errors


@pytest.mark.parametrize("how", ["timeout", "kill"])
def test_interrupted_at_any_moment_both_are_committed_or_none(
    pair: tuple[Database, Database], key: str, how: str
) -> None:
    """The process lives on: what it does not know the end of, it leaves to in_doubt."""
    urls = [database.url("two") for database in pair]
    script = str(TESTS / "scripts" / "two_phase_storm.py")
    command = [sys.executable, script, *urls, key, str(amount(200, 3000)), how]
    found = {"PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=TESTS, env=found, check=False)
    assert done.stdout == "ended\n", done.stderr
    with app_with(*urls) as db:
        engines = {name: one.engine for name, one in db.databases.items()}
        for _ in range(3):
            time.sleep(1)  # what was under way when its connection was closed may still arrive
            resolve_all(engines)
        assert in_doubt.find(engines) == []
    here, there = (sorted(database.rows(key)) for database in pair)
    assert here == there
    assert {"-1", "-2"} <= set(here)
    assert len(here) < amount(200, 3000) + 2, "some were interrupted"


def test_a_server_is_known_whichever_way_one_connects(
    pair: tuple[Database, Database], tmp_path: Path, key: str
) -> None:
    """The workers connect by a proxy, on another port, and by another name of the host."""
    with contextlib.ExitStack() as stack:
        proxied = [stack.enter_context(CountingProxy(make_url(one.url("two")))).url for one in pair]
        urls = [url.set(host="localhost").render_as_string(hide_password=False) for url in proxied]
        assert commit_and_die(tmp_path, urls, key, "default", 3)[0]
    with app_with(*[one.url("two") for one in pair]) as db:
        eventually(lambda: len(in_doubt.find(engines_of(db))) == 2, "both are found")
        eventually(lambda: resolve_all(engines_of(db)) == [], "the server has noticed")
        assert in_doubt.find(engines_of(db)) == []
    rows = [one.rows(key) for one in pair]
    assert rows == [[], []] if isinstance(pair[0], PostgreSQL) else [["written"], ["written"]]


@pytest.mark.parametrize(
    ("decider", "like_it", "other"), [("here", "third", "beside"), ("elsewhere", "other_schema", "here")]
)
@pytest.mark.parametrize("step", [3, 4])
def test_what_another_deployment_has_prepared_is_reported_and_left(
    request: pytest.FixtureRequest, tmp_path: Path, key: str, decider: str, like_it: str, other: str, step: int
) -> None:
    """Both deployments have a database on each of two servers, and share one of them; the names are the same."""
    first, alike, shared = (request.getfixturevalue(name) for name in (decider, like_it, other))
    urls = [first.url("two"), shared.url("two")]
    assert commit_and_die(tmp_path, urls, key, "default", step)[0]
    with app_with(*urls) as db, app_with(alike.url("two"), shared.url("two")) as theirs:
        eventually(lambda: bool(in_doubt.find(engines_of(db))), "the server has noticed")
        ours = {one.name for one in in_doubt.find(engines_of(db))}
        found = in_doubt.look(engines_of(theirs))
        assert found.ours == []
        reported = [one for one in found.foreign if one.name in ours]
        assert reported
        assert all("another deployment" in one.why for one in reported)
        assert {one.name for one in in_doubt.find(engines_of(db))} == ours
        eventually(lambda: resolve_all(engines_of(db)) == [], "all is resolved")
    assert first.rows(key) == shared.rows(key)


def test_names_of_an_older_version_are_reported_and_left(here: PostgreSQL, beside: PostgreSQL, key: str) -> None:
    with here.engine.connect() as connection:
        connection.execute(text("BEGIN"))
        connection.execute(text("INSERT INTO rows_ (key_, note) VALUES (:key, 'other')"), {"key": key})
        connection.execute(text("PREPARE TRANSACTION 'alchemy/default/abcdef/default/0'"))
    try:
        with app_with(here.url("two"), beside.url("two")) as db:
            found = in_doubt.look(engines_of(db))
            assert found.ours == []
            (one,) = found.foreign
            assert (one.database, one.name) == ("default", "alchemy/default/abcdef/default/0")
            assert "another version" in one.why
    finally:
        here.execute("ROLLBACK PREPARED 'alchemy/default/abcdef/default/0'")


def test_a_database_that_cannot_prepare_may_have_committed(here: PostgreSQL, tmp_path: Path, key: str) -> None:
    """Its COMMIT decides, and leaves no trace: what is prepared beside it is left to people."""
    with databases.new_sqlite(tmp_path / "two.sqlite3") as file, app_with(here.url("two"), file.url("")) as db:
        with here.engine.connect() as connection:
            connection.execute(text("BEGIN"))
            connection.execute(text("INSERT INTO rows_ (key_, note) VALUES (:key, 'one')"), {"key": key})
            connection.execute(text("PREPARE TRANSACTION 'alchemy/default/-/p.0'"))
        try:
            (one,) = in_doubt.find(engines_of(db))
            assert one.commits is None
            assert "'reports' cannot prepare" in one.why
            assert not in_doubt.resolve(engines_of(db), one)
        finally:
            here.execute("ROLLBACK PREPARED 'alchemy/default/-/p.0'")


def test_the_command_lists_and_resolves(here: PostgreSQL, beside: PostgreSQL, key: str, tmp_path: Path) -> None:
    urls = [here.url("two"), beside.url("two")]
    commit_and_die(tmp_path, urls, key, "default", STEPS)
    (tmp_path / "shop.py").write_text(
        "from celery import Celery\nfrom celery_alchemy import Alchemy\n"
        f"app = Celery('shop', broker='memory://')\napp.conf.update(alchemy_database_url={urls[0]!r},"
        f" alchemy_databases={{'reports': {urls[1]!r}}}, alchemy_two_phase=True)\ndb = Alchemy(app)\n"
    )
    command = [sys.executable, "-m", "celery", "-A", "shop", "alchemy", "in-doubt", "--wait-s", "0.2"]

    def run(*more: str) -> "subprocess.CompletedProcess[str]":
        return preloaded.run([*command, *more], cwd=tmp_path, env=os.environ, timeout=250)

    assert (here.rows(key), beside.rows(key)) == (["written"], [])
    listed = run()
    assert listed.returncode == 1, listed
    assert "reports: alchemy/reports/" in listed.stdout
    assert "to be committed" in listed.stdout
    assert "--resolve" in listed.stderr
    assert run("--resolve").returncode == 0
    assert beside.rows(key) == ["written"]
    assert "nothing in doubt" in run().stdout
