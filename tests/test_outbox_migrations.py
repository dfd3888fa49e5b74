"""The migrations of docs/outbox.md make the table that this version needs, from nothing and from the old one."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from support import databases, servers
from support.databases import Database
from support.docs import DOCS, run_page

from celery_alchemy import outbox_table
from celery_alchemy.strategies.features import outbox
from celery_alchemy.strategies.features.outbox_state import drift

BACKENDS = ("postgresql", "mariadb", "sqlite")
ENV = """
from alembic import context
connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=None, render_as_batch=connection.dialect.name == "sqlite")
with context.begin_transaction():
    context.run_migrations()
"""


@pytest.fixture(scope="module", params=BACKENDS)
def place(
    request: pytest.FixtureRequest,
    postgresql_server: sa.URL,
    run_name: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Database]:
    name = f"{run_name}_migrations"
    made: dict[str, Any] = {
        "postgresql": lambda: databases.new_postgresql(postgresql_server, name),
        "mariadb": lambda: databases.new_mariadb(servers.mariadb(), name),
        "sqlite": lambda: databases.new_sqlite(tmp_path_factory.mktemp("migrations") / "shop.sqlite3"),
    }
    opened: AbstractContextManager[Database] = made[request.param]()
    with opened as database:
        yield database


@pytest.fixture
def bare(place: Database) -> Database:
    """A database without an outbox."""
    for table in ("celery_alchemy_outbox", "alembic_version"):
        place.execute(f"DROP TABLE IF EXISTS {table}")
    return place


def migration(title: str) -> str:
    """Return the migration of a section of the page."""
    words = (DOCS / "outbox.md").read_text(encoding="utf-8").partition(f"\n### {title}\n")[2].partition("\n##")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```", words, flags=re.M | re.S)
    return str(code)


class Alembic:
    """A project with the migrations that are given."""

    def __init__(self, folder: Path, database: Database, *migrations: str) -> None:
        (folder / "versions").mkdir()
        (folder / "env.py").write_text(ENV)
        (folder / "script.py.mako").write_text("")
        for number, code in enumerate(migrations):
            (folder / "versions" / f"v{number}.py").write_text(code)
        self._config = Config()
        self._config.set_main_option("script_location", str(folder))
        self._engine = database.engine.execution_options(isolation_level=None)

    def __call__(self, what: Any, *arguments: str) -> None:
        engine = sa.create_engine(self._engine.url, poolclass=sa.NullPool)
        with engine.begin() as connection:
            self._config.attributes["connection"] = connection
            what(self._config, *arguments)


def assert_right(database: Database) -> None:
    """The table is the one that this version needs, autogenerate has nothing to add, and it can be used."""
    metadata = sa.MetaData()
    table = outbox_table(metadata)
    with sa.create_engine(database.engine.url, poolclass=sa.NullPool).connect() as connection:
        assert drift(connection, table) is None

        def include(name: str | None, kind: str, parents: Any) -> bool:
            return kind != "table" or name == table.name

        context = MigrationContext.configure(connection, opts={"include_name": include, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []
        outbox.write(connection, table, [outbox.Message("id", "note", "x" * 70_000)], lease_s=0)
        assert [row.length for row in outbox.claim(connection, table)] == [70_000]


def test_from_nothing(bare: Database, tmp_path: Path) -> None:
    alembic = Alembic(tmp_path, bare, migration("From nothing"))
    alembic(command.upgrade, "head")
    assert_right(bare)
    alembic(command.downgrade, "base")
    assert not sa.inspect(bare.engine).has_table("celery_alchemy_outbox")


OLD = """
import sqlalchemy as sa
from alembic import op

revision = "outbox_1"
down_revision = None

def upgrade():
    op.create_table(
        "celery_alchemy_outbox",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("attempts", sa.Integer, server_default="0", nullable=False),
        sa.Column("messages", sa.Text().with_variant(sa.Text(2**24), "mysql", "mariadb"), nullable=False),
    )
"""


def test_from_the_old_table(bare: Database, tmp_path: Path) -> None:
    alembic = Alembic(tmp_path, bare, OLD, migration("From the table of an older version"))
    alembic(command.upgrade, "outbox_1")
    bare.execute("INSERT INTO celery_alchemy_outbox (messages) VALUES ('[]')")
    with pytest.raises(RuntimeError, match="1 rows wait in the outbox"):
        alembic(command.upgrade, "head")
    assert bare.column("SELECT messages FROM celery_alchemy_outbox") == ["[]"], "nothing is lost"
    bare.execute("DELETE FROM celery_alchemy_outbox")
    alembic(command.upgrade, "head")
    assert_right(bare)
    alembic(command.downgrade, "outbox_1")
    bare.execute("INSERT INTO celery_alchemy_outbox (messages) VALUES ('[]')")


def test_from_a_table_without_sends(bare: Database, tmp_path: Path) -> None:
    whole = migration("From nothing")
    new = ('"nesting"', '"sends"', "ix_celery_alchemy_outbox_task_id")
    before = "".join(line for line in whole.splitlines(keepends=True) if not any(word in line for word in new))
    assert before != whole
    alembic = Alembic(tmp_path, bare, before, migration("From a table without `sends`"))
    alembic(command.upgrade, "outbox_1")
    insert = (
        "INSERT INTO celery_alchemy_outbox (batch, position, created_at, task_id, task, message) "
        "VALUES ('b', 0, 0, 'i', 'note', '{}')"
    )
    bare.execute(insert)
    alembic(command.upgrade, "head")
    assert bare.column("SELECT sends FROM celery_alchemy_outbox") == [0]
    bare.execute("DELETE FROM celery_alchemy_outbox")
    assert_right(bare)
    alembic(command.downgrade, "outbox_1")
    bare.execute(insert.replace("'b'", "'c'"))


def test_a_table_made_by_create_all_is_the_same(bare: Database) -> None:
    outbox_table(metadata := sa.MetaData())
    metadata.create_all(bare.engine)
    assert_right(bare)


def test_the_page_sets_it_up(tmp_path: Path) -> None:
    found = run_page("outbox.md", tmp_path, title="Set it up")
    found["Base"].metadata.create_all(found["db"].engine)
    assert found["db"].settings.outbox is True
    found["db"].stop()
