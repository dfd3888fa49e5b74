"""The code on the pages below docs/ runs as it stands, but for the addresses of the servers."""

import ast
import re
from pathlib import Path

from sqlalchemy import text
from support.docs import DOCS, run_page


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


def test_pgbouncer(tmp_path: Path) -> None:
    found = run_page("doctor.md", tmp_path, title="PgBouncer")
    found["app"].conf.alchemy_database_url = "postgresql+psycopg://localhost/shop"
    assert found["db"].strategy.engines.options.external_pooler
    found["db"].stop()


def test_the_doctors_page_names_every_code() -> None:
    """And no other."""
    written = set()
    for path in (DOCS.parent / "workers" / "doctor").glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(("error", "warning", "note", "warning)")):
                written |= {argument.value for argument in call.args[:1] if isinstance(argument, ast.Constant)}
    table = (DOCS / "doctor.md").read_text().partition("## What it finds")[2].partition("\n## ")[0]
    cells = " ".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`([a-z-]+)`", cells)) == written
