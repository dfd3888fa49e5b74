"""The code on the pages below docs/ runs as it stands, but for the addresses of the servers."""

import ast
import os
import re
import sys
from pathlib import Path
from typing import Any

from sqlalchemy import event, text
from sqlalchemy.orm import Session
from support import preloaded
from support.databases import PostgreSQL
from support.docs import DOCS, blocks, code_of, run_page

from celery_alchemy import WorkerPool
from celery_alchemy.workers.doctor.rules.catalogue import CATALOGUE
from celery_alchemy.workers.sending.recording import recording


def test_the_tutorial(tmp_path: Path) -> None:
    code = code_of("tutorial.md", f"sqlite:///{tmp_path}/shop.sqlite3").replace("task(base", "task(shared=False, base")
    code = code.replace("from shop import", "# from shop import")
    shop, *block = code.partition("with db.unit_of_work()")
    found: dict[str, Any] = {"__name__": "shop"}
    exec(compile(shop, "tutorial.md", "exec", dont_inherit=True), found)
    db, User = found["db"], found["User"]
    found["Base"].metadata.create_all(db.engine)
    found["app"].conf.task_always_eager = True

    def names() -> set[str]:
        with db.unit_of_work() as session:
            return {user.name for user in session.query(User)}

    found["create"].delay("grace").get()
    assert names() == {"grace"}
    exec(compile("".join(block), "tutorial.md", "exec", dont_inherit=True), found)
    assert found["create"].delay("edsger").failed()
    found["rename_user"].delay("edsger", "ada lovelace").get()
    found["welcome"].delay("alan").get()
    found["register"].delay("kurt").get()
    assert names() == {"grace", "ada lovelace", "Alan", "Kurt"}
    assert found["how_many"].delay().get() == 4
    assert found["count"].delay("g").get() == 1
    db.stop()


def test_several_databases(tmp_path: Path) -> None:
    found = run_page("several-databases.md", tmp_path)
    app, db, reports = found["app"], found["db"], found["reports"]
    app.conf.alchemy_two_phase = False  # the files have none
    with db.unit_of_work() as session:
        session.execute(text("CREATE TABLE orders (day text)"))
        session.execute(text("INSERT INTO orders VALUES ('a'), ('a'), ('b')"))
        reports.session.execute(text("CREATE TABLE days (day text, orders int)"))
    found["close_day"].apply(("a",)).get()
    with reports.unit_of_work() as session:
        assert session.execute(text("SELECT * FROM days")).all() == [("a", 2)]


def test_sending(tmp_path: Path) -> None:
    code = code_of("sending.md", f"sqlite:///{tmp_path}/shop.db").replace("@app.task", "@app.task(shared=False)")
    code = code.replace("(shared=False)(", "(shared=False, ")
    found: dict[str, Any] = {"__name__": "shop"}
    head, _, tail = code.partition("with db.unit_of_work()")
    exec(compile(head, "sending.md", "exec", dont_inherit=True), found)
    found["Base"].metadata.create_all(found["db"].engine)
    try:
        with recording(found["app"]) as sent:
            exec(compile(f"with db.unit_of_work(){tail}", "sending.md", "exec", dont_inherit=True), found)
            sent.assert_enqueued(found["welcome"], (1,), count=1)
            sent.assert_enqueued(found["count"], count=1)
    finally:
        found["db"].stop()


def test_pgbouncer(tmp_path: Path) -> None:
    found = run_page("pgbouncer.md", tmp_path)
    found["app"].conf.alchemy_database_url = "postgresql+psycopg://localhost/shop"
    assert found["db"].strategy.engines.options.external_pooler
    found["db"].stop()


def test_the_doctors_page_names_every_code() -> None:
    """And no other."""
    written = set(CATALOGUE)
    for path in (DOCS.parent / "workers" / "doctor").glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(("error", "warning", "note", "warning)")):
                written |= {argument.value for argument in call.args[:1] if isinstance(argument, ast.Constant)}
    table = (DOCS / "doctor.md").read_text().partition("## What it finds")[2].partition("\n## ")[0]
    cells = " ".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`([a-z-]+)`", cells)) == written


def test_tenants(run_database: PostgreSQL) -> None:
    """Each task has its own tenant, the one after it has none, with the setting and without."""
    found: dict[str, Any] = {"__name__": "shop"}
    code = code_of("tenants.md", run_database.url("tenants")).replace("@app.task(", "@app.task(shared=False, ")
    exec(compile(code, "tenants.md", "exec", dont_inherit=True), found)
    db = found["db"]
    try:
        asks = text("SELECT coalesce(current_setting('app.tenant', true), '')")
        for on in (True, False):
            found["app"].conf.alchemy_reset_on_return = on
            db.start_worker(WorkerPool(name="threads", concurrency=1))
            assert db.strategy.engines.options.reset_on_return is on
            for tenant in ("a", "b"):
                assert found["close_orders"].apply((tenant,)).get() == tenant
                with db.unit_of_work() as session:
                    assert session.scalar(asks) == ""
            with db.unit_of_work() as session:
                session.execute(text("CREATE SCHEMA IF NOT EXISTS of_a"))
                session.execute(text("CREATE TABLE IF NOT EXISTS of_a.orders (id int)"))
                session.execute(text("INSERT INTO of_a.orders VALUES (1)"))
            assert found["count_orders"].apply(("of_a",)).get() == (1 if on else 2)
            db.stop()
    finally:
        event.remove(Session, "after_begin", found["name_the_tenant"])
        run_database.execute("DROP SCHEMA of_a CASCADE")


def test_django(tmp_path: Path) -> None:
    """In a process of its own: Django has one configuration for each."""
    settings, app = blocks((DOCS / "django.md").read_text(), "python")
    settings = 'SECRET_KEY = "x"\n' + settings
    (tmp_path / "settings.py").write_text(
        settings.replace("postgresql+psycopg://localhost/reports", "sqlite:///reports.db")
    )
    code = (
        app
        + """
with db.unit_of_work() as session:
    session.execute(text("CREATE TABLE reports (id int)"))
print(count_reports.apply().get(), app.conf.broker_url, type(app.loader).__name__)
"""
    )
    done = preloaded.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ, timeout=250)
    assert done.stdout.startswith("0 redis://localhost"), done.stderr
