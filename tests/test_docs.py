"""The code on the pages below docs/ runs as it stands, but for the addresses of the servers."""

from pathlib import Path

from sqlalchemy import text
from support.docs import run_page


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
