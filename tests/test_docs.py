"""The code on the pages below docs/ runs as it stands, but for the addresses of the servers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Run the Python blocks of a page, one after another, on SQLite files; return what they defined."""
    monkeypatch.chdir(tmp_path)

    def run_page(page: str, *, title: str = "", namespace: dict[str, Any] | None = None) -> dict[str, Any]:
        words = (DOCS / page).read_text(encoding="utf-8")
        if title:
            words = words.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        blocks = re.findall(r"^```python\n(.*?)^```", words, flags=re.M | re.S)
        assert blocks, f"no code in {page}"
        found = {"__name__": "shop"} if namespace is None else namespace
        for block in blocks:
            code = re.sub(r"postgresql\+psycopg://localhost/(\w+)", rf"sqlite:///{tmp_path}/\1.sqlite3", block)
            code = code.replace("redis://localhost", "memory://")
            exec(compile(code, page, "exec", dont_inherit=True), found)
        return found

    return run_page


def test_several_databases(run: Callable[..., dict[str, Any]]) -> None:
    found = run("several-databases.md")
    app, db, reports = found["app"], found["db"], found["reports"]
    app.conf.alchemy_two_phase = False  # the files have none
    with db.unit_of_work() as session:
        session.execute(text("CREATE TABLE orders (day text)"))
        session.execute(text("INSERT INTO orders VALUES ('a'), ('a'), ('b')"))
        reports.session.execute(text("CREATE TABLE days (day text, orders int)"))
    found["close_day"].apply(("a",)).get()
    with reports.unit_of_work() as session:
        assert session.execute(text("SELECT * FROM days")).all() == [("a", 2)]
