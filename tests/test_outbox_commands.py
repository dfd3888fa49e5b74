"""`celery alchemy outbox list | retry | drop`, and what the doctor and `inspect sessions` say of the outbox."""

import gc
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from click.testing import CliRunner, Result
from sqlalchemy import URL, MetaData, Table, text, update
from support import databases, preloaded, servers
from support.databases import Database, PostgreSQL
from support.worker import Site, Worker, running

from celery_alchemy import Alchemy, outbox_table
from celery_alchemy.strategies.features import outbox
from celery_alchemy.strategies.features.outbox_state import drift, look
from celery_alchemy.workers.commands import alchemy
from celery_alchemy.workers.doctor.outbox import look_at_outbox

BACKENDS = ("postgresql", "mariadb", "sqlite")


@pytest.fixture(scope="module", params=BACKENDS)
def place(
    request: pytest.FixtureRequest, postgresql_server: URL, run_name: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Database]:
    """A database of this module's own."""
    name = f"{run_name}_rows"
    if request.param == "postgresql":
        opened: Any = databases.new_postgresql(postgresql_server, name)
    elif request.param == "mariadb":
        opened = databases.new_mariadb(servers.mariadb(), name)
    else:
        opened = databases.new_sqlite(tmp_path_factory.mktemp("outbox") / "shop.sqlite3")
    with opened as database:
        yield database


class Box:
    """The outbox of an app, filled by hand, and its commands."""

    def __init__(self, database: Database, **settings: Any) -> None:
        self.app = Celery("box", broker="memory://", set_as_current=False)
        self.app.conf.update(alchemy_database_url=database.url("box"), alchemy_outbox=True, **settings)
        self.db = Alchemy(self.app)
        self.engine = database.engine
        self.table: Table = outbox.chosen_table("celery_alchemy_outbox")

    def write(self, *names: str, task: str = "note", lease_s: float = 0.0) -> None:
        with self.engine.begin() as connection:
            messages = [outbox.Message(name, task, "{}") for name in names]
            outbox.write(connection, self.table, messages, lease_s=lease_s)

    def set(self, name: str, **values: Any) -> None:
        with self.engine.begin() as connection:
            connection.execute(update(self.table).where(self.table.c.task_id == name).values(**values))

    def ids(self) -> list[str]:
        with self.engine.begin() as connection:
            return [row.task_id for row in outbox.listed(connection, self.table, [])]

    def call(self, *arguments: str) -> Result:
        return CliRunner().invoke(alchemy, ["outbox", *arguments], obj=SimpleNamespace(app=self.app))

    def json(self, *arguments: str) -> Any:
        return json.loads(self.call(*arguments, "--json").output)


@pytest.fixture
def box(place: Database) -> Iterator[Box]:
    place.execute("DELETE FROM celery_alchemy_outbox")
    box = Box(place)
    yield box
    box.db.stop()


def test_list_shows_what_waits_and_why(box: Box) -> None:
    box.write("a", "b")
    box.write("c", task="mail", lease_s=60)
    box.set("b", due_at=None, attempts=10, error="ValueError: too\nlong")
    lines = box.call("list").output.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["a", "note"], ["b", "note"], ["c", "mail"]]
    assert "due" in lines[0]
    assert "set aside, 10 failed  ValueError: too long" in lines[1]
    assert re.search(r"being sent, or due in (5\d|60) s", lines[2])
    assert re.match(r"2 waiting, the oldest for \d+ s; 1 set aside", lines[3])


def test_list_is_json_for_scripts(box: Box) -> None:
    box.write("a", "b")
    box.set("a", due_at=None, error="no such queue", attempts=10)
    box.set("b", created_at=0.0, expires_at=1.0)
    found = box.json("list")
    assert (found["waiting"], found["set_aside"]) == (1, 1)
    assert found["oldest_s"] > 1e9
    a, b = found["messages"]
    assert (a["task_id"], a["state"], a["error"], a["attempts"], a["due_at"]) == (
        "a", "set aside", "no such queue", 10, None,
    )  # fmt: skip
    assert b["state"] == "expired"
    assert "message" not in a, "arguments are nobody's business"


def test_ids_that_differ_in_case_are_two_messages(box: Box) -> None:
    """To MariaDB they are the same."""
    box.write("Order", "order")
    assert [one["task_id"] for one in box.json("list", "order")["messages"]] == ["order"]
    assert box.call("drop", "Order").exit_code == 0
    assert box.ids() == ["order"]


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [
        (["b"], {"b"}),
        (["a", "c", "nobody"], {"a", "c"}),
        (["--task", "mail"], {"c", "d"}),
        (["--set-aside"], {"b", "d"}),
        (["--set-aside", "--task", "mail"], {"d"}),
        (["a", "--task", "mail"], set()),
    ],
)
def test_rows_are_chosen_by_all_that_is_said(box: Box, arguments: list[str], chosen: set[str]) -> None:
    box.write("a", "b")
    box.write("c", "d", task="mail")
    for name in ("b", "d"):
        box.set(name, due_at=None, attempts=10, error="E")
    assert {one["task_id"] for one in box.json("list", *arguments)["messages"]} == chosen
    done = box.call("retry", *arguments)
    assert done.output.startswith(f"{len(chosen)} message")
    assert done.exit_code == (0 if chosen else 1)
    waiting = {one["task_id"] for one in box.json("list")["messages"] if one["state"] == "due"}
    assert waiting == {"a", "c"} | chosen
    for name in ("b", "d"):
        box.set(name, due_at=None)
    assert box.call("drop", *arguments).exit_code == (0 if chosen else 1)
    assert set(box.ids()) == {"a", "b", "c", "d"} - chosen


def test_what_a_terminal_would_obey_is_not_printed(box: Box) -> None:
    """Whoever can write to the table decides what is in it."""
    box.write("a\x1b[2Jid", task="note\x07")
    box.set("a\x1b[2Jid", due_at=None, error="E\x1b]0;title\x07")
    output = box.call("list").output
    assert output.startswith("a?[2Jid  note?  ")
    assert "E?]0;title?" in output
    assert all(character.isprintable() or character == "\n" for character in output)
    assert all(one.what.isprintable() for one in look_at_outbox(box.db, box.engine))


def test_a_retried_message_begins_anew(box: Box) -> None:
    box.write("a")
    box.set("a", due_at=None, attempts=10, error="E")
    assert box.json("retry", "--all") == {"messages": 1}
    (one,) = box.json("list")["messages"]
    assert (one["state"], one["attempts"], one["error"]) == ("due", 0, None)


def test_what_is_being_sent_is_not_retried(box: Box) -> None:
    """It would be sent twice."""
    box.write("a", lease_s=60)
    assert box.call("retry", "a").exit_code == 1


def test_everything_must_be_asked_for(box: Box) -> None:
    box.write("a")
    for command in ("retry", "drop"):
        for arguments in ([], ["a", "--all"]):
            done = box.call(command, *arguments)
            assert done.exit_code == 2
            assert "or --all alone" in done.output
    assert box.ids() == ["a"]
    assert box.json("drop", "--all") == {"messages": 1}
    assert box.ids() == []


def test_list_says_where_it_stops(box: Box) -> None:
    box.write("a", "b", "c")
    output = box.call("list", "--limit", "2").output
    assert output.count("note") == 2
    assert "3 waiting" in output
    assert "--limit 2" in output


def test_without_its_table_it_says_so(box: Box, place: Database) -> None:
    place.execute("ALTER TABLE celery_alchemy_outbox RENAME TO away")
    try:
        done = box.call("list")
    finally:
        place.execute("ALTER TABLE away RENAME TO celery_alchemy_outbox")
    assert done.exit_code == 1
    assert "has no table 'celery_alchemy_outbox'. Create it" in done.output


def test_a_database_that_is_away_says_so(place: Database) -> None:
    app = Celery("away", broker="memory://", set_as_current=False)
    app.conf.update(alchemy_database_url="postgresql+psycopg://u:secret@127.0.0.1:1/x", alchemy_outbox=True)
    db = Alchemy(app)
    done = CliRunner().invoke(alchemy, ["outbox", "list"], obj=SimpleNamespace(app=app))
    assert done.exit_code == 1
    assert "The outbox cannot be looked at" in done.output
    assert "secret" not in done.output
    db.stop()


def test_an_app_without_an_alchemy_says_so() -> None:
    app = Celery("none", broker="memory://", set_as_current=False)
    done = CliRunner().invoke(alchemy, ["outbox", "list"], obj=SimpleNamespace(app=app))
    assert done.exit_code == 1
    assert "has no Alchemy" in done.output


def test_the_command_line(place: Database, tmp_path: Path) -> None:
    """As an operator types it, for a table of another name and schema."""
    table = "app.messages" if place.engine.dialect.name == "postgresql" else "messages"
    (tmp_path / "shop.py").write_text(
        "from celery import Celery\nfrom celery_alchemy import Alchemy\n"
        "app = Celery('shop', broker='memory://')\n"
        f"app.conf.update(alchemy_database_url={place.url('cli')!r}, alchemy_outbox=True, "
        f"alchemy_outbox_table={table!r})\n"
        "db = Alchemy(app)\n"
    )
    if "." in table:
        place.execute("CREATE SCHEMA app")
    mine = outbox.chosen_table(table)
    mine.create(place.engine)
    with place.engine.begin() as connection:
        outbox.write(connection, mine, [outbox.Message("my-id", "note", "{}")], lease_s=0)
    command = [sys.executable, "-m", "celery", "-A", "shop", "alchemy", "outbox"]
    for arguments, said in ((["list"], "my-id  note"), (["drop", "my-id"], "1 message: dropped")):
        done = preloaded.run([*command, *arguments], cwd=tmp_path, env=os.environ, timeout=250)
        assert done.stdout.startswith(said), done.stderr


# -- the doctor --------------------------------------------------------------------------------------------------------


def codes(box: Box) -> dict[str, Any]:
    return {one.code: one for one in look_at_outbox(box.db, box.engine)}


def test_the_doctor_has_nothing_against_an_outbox_that_is_sent(box: Box) -> None:
    assert codes(box) == {}
    box.write("a", lease_s=60)
    box.write("b")
    assert codes(box) == {}


def test_the_doctor_tells_what_nobody_sends_from_what_cannot_be_sent(box: Box) -> None:
    box.write("a", "b", lease_s=60)
    with box.engine.begin() as connection:
        now = look(connection, box.table).counts.oldest_s
        assert now is not None
        connection.execute(update(box.table).values(created_at=box.table.c.created_at - 100))
    late = codes(box)
    assert set(late) == {"outbox-late"}
    assert late["outbox-late"].level == "error"
    box.set("a", due_at=1.0)
    assert set(codes(box)) == {"outbox-not-sent"}
    assert "outbox run" in codes(box)["outbox-not-sent"].remedy


def test_the_doctor_tells_what_waits_from_what_was_sent(box: Box) -> None:
    box.write("a")
    box.set("a", sends=1, due_at=1.0)
    assert "In the outbox 1 message was sent, its receiver has not told" in codes(box)["outbox-not-sent"].what
    box.write("b", "c")
    box.set("b", sends=2, due_at=1.0)
    assert "1 message waits to be sent; 2 messages were sent, their" in codes(box)["outbox-not-sent"].what


def test_the_doctor_shows_what_is_set_aside(box: Box) -> None:
    box.write("a", "b")
    box.set("b", due_at=None, attempts=10, error="ValueError: no such queue")
    one = codes(box)["outbox-set-aside"]
    assert one.level == "warning"
    assert "1 message could not be sent, and is set aside; the last error: ValueError: no such queue." in one.what


CHANGES = {
    "an old table": (
        "DROP TABLE t",
        "CREATE TABLE t (id INTEGER PRIMARY KEY, created_at TIMESTAMP, attempts INTEGER, messages TEXT)",
    ),
    "a missing column": ("ALTER TABLE t DROP COLUMN expires_at",),
    "a missing index": ("{drop_index}",),
    "no table": ("DROP TABLE t",),
    "more columns": ("ALTER TABLE t ADD COLUMN mine INTEGER",),
    "nothing": (),
}
DROP_INDEX = {"mariadb": "DROP INDEX ix_t_due_at ON t", "mysql": "DROP INDEX ix_t_due_at ON t"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "an old table",
            "'batch', 'position', 'due_at', 'task_id', 'task', 'expires_at', 'error', 'nesting', 'sends' nor 'message'",
        ),
        ("a missing column", "has no 'expires_at'"),
        ("a missing index", "no index that begins with 'due_at'"),
        ("no table", "has no table 't'"),
        ("more columns", None),
        ("nothing", None),
    ],
)
def test_drift_of_the_table(place: Database, change: str, words: str | None) -> None:
    table = outbox.chosen_table("t")
    table.drop(place.engine, checkfirst=True)
    table.create(place.engine)
    drop_index = DROP_INDEX.get(place.engine.dialect.name, "DROP INDEX ix_t_due_at")
    for sql in CHANGES[change]:
        place.execute(sql.format(drop_index=drop_index))
    with place.engine.connect() as connection:
        found = drift(connection, table)
    place.execute("DROP TABLE IF EXISTS t")
    if words is None:
        assert found is None
    else:
        assert found is not None
        assert words in found.what
        assert ("outbox_table(" if change == "no table" else "docs/outbox.md") in found.remedy


def test_two_tables_and_no_setting(box: Box) -> None:
    tables = [outbox_table(MetaData(), name=f"two_{number}") for number in range(2)]
    (one,) = look_at_outbox(box.db, box.engine)
    del tables
    gc.collect()  # they are declared as long as they are there, for all tests of this process
    assert one.code == "outbox-table"
    assert "alchemy_outbox_table" in one.remedy
    assert codes(box) == {}


# -- inspect -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "eventlet", "solo"])
def test_inspect_sessions_tells_of_the_outbox(site: Site, run_database: PostgreSQL, key: str, pool: str) -> None:
    run_database.execute("DELETE FROM celery_alchemy_outbox")
    name = f"{site.prefix[:-1]}-outbox-{pool}"
    relays = pool in {"prefork", "solo"}
    settings = {"alchemy_outbox": "relay" if relays else True}
    worker = Worker(site, name, pool, database_url=run_database.url(name), modules=("endings",), settings=settings)
    with running(worker):
        assert ("is sent by `celery -A ... alchemy outbox run` alone" in worker.log()) == relays
        nothing = {"waiting": 0, "sent": 0, "set_aside": 0, "oldest_s": None, "error": None}
        assert worker.inspect("sessions")["outbox"] == nothing
        with run_database.engine.begin() as connection:
            table = outbox.chosen_table("celery_alchemy_outbox")
            outbox.write(connection, table, [outbox.Message(key, "note", "{}")], lease_s=600)
        found = worker.inspect("sessions")
        assert found["outbox"]["waiting"] == 1
        assert found["outbox"]["oldest_s"] >= 0
        assert [one for process in found["processes"] for one in process["open"]] == []
        # A database that does not answer keeps nobody from an answer.
        with run_database.engine.execution_options(isolation_level="READ COMMITTED").begin() as connection:
            connection.execute(text("LOCK TABLE celery_alchemy_outbox"))
            silent = worker.inspect("sessions")["outbox"]
            assert "does not answer" in silent["error"]
            assert set(silent) == set(found["outbox"])
    run_database.execute("DELETE FROM celery_alchemy_outbox")
    databases.assert_no_connections(run_database, name)
