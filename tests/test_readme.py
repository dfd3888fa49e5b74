"""The README's quickstart, pasted; its diff, applied; its numbers, looked up."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, Task
from sqlalchemy import create_engine, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker
from support.docs import blocks
from support.waiting import eventually
from support.worker import start_process, stop_process

from celery_alchemy import Alchemy, DatabaseTask

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short_and_opens_with_the_two_commands() -> None:
    assert len(README.splitlines()) <= 150
    assert README.index("make demo") < README.index("make test") < README.index("## ")


def said(log: Path, pattern: str) -> bool:
    return log.exists() and re.search(pattern, log.read_text()) is not None


def test_the_quickstart_runs_when_pasted(tmp_path: Path) -> None:
    (code,) = [block for block in blocks(README, "python") if "app = Celery" in block]
    (commands,) = [block for block in blocks(README, "sh") if "celery -A" in block]
    (output,) = [block for block in blocks(README, "") if "worker pool" in block]
    (tmp_path / "shop.py").write_text(code)
    first, worker = ([sys.executable, *line.split("#")[0].split()] for line in commands.splitlines())
    assert (first[1], worker[1]) == ("python", "celery")
    done = subprocess.run(
        [first[0], *first[2:]], cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr

    log = tmp_path / "worker.log"
    process = start_process([worker[0], "-m", *worker[1:]], log, {"PYTHONPATH": str(tmp_path)})
    try:
        for line in output.splitlines():
            pattern = re.escape(line).replace(r"\.\.\.", ".*")
            eventually(partial(said, log, pattern), f"the worker says {line}")
    finally:
        stop_process(process)
    engine = create_engine(f"sqlite:///{tmp_path}/shop.sqlite3")
    with engine.connect() as connection:
        assert sorted(connection.scalars(text("SELECT name FROM users"))) == ["ada", "grace"]
    engine.dispose()


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


@pytest.mark.parametrize("sign", ["-", "+"])
def test_the_diff_does_the_same_before_and_after(sign: str, tmp_path: Path) -> None:
    (diff,) = blocks(README, "diff")
    code = "\n".join(line[1:] for line in diff.splitlines() if line[:1] in {sign, " "})
    url = f"sqlite:///{tmp_path}/shop.sqlite3"
    code = code.replace("postgresql+psycopg://localhost/shop", url).replace("redis://localhost", "memory://")
    engine = create_engine(url)
    Base.metadata.create_all(engine)
    sent: list[str] = []
    found: dict[str, Any] = {"Alchemy": Alchemy, "Celery": Celery, "DatabaseTask": DatabaseTask, "User": User}
    found["SessionLocal"] = sessionmaker(engine)
    exec(compile(code.replace("task(", "task(shared=False, "), "README.md", "exec", dont_inherit=True), found)
    base = Task if sign == "-" else DatabaseTask
    found["app"].conf.task_always_eager = True

    def welcome(name: str) -> None:
        sent.append(name)

    found["welcome"] = found["app"].task(welcome, base=base, shared=False)
    found["register"].apply(("ada",)).get()
    assert sent == ["ada"]
    with engine.connect() as connection:
        assert connection.scalars(text("SELECT name FROM users")).all() == ["ada"]
    if sign == "+":
        found["db"].stop()
    engine.dispose()


def test_the_recipe_has_one_session_for_all() -> None:
    """As the text says."""
    (code,) = [block for block in blocks(README, "python") if "after_return" in block]
    found: dict[str, Any] = {"Task": Task, "SessionLocal": sessionmaker()}
    exec(compile(code, "README.md", "exec", dont_inherit=True), found)
    app = Celery(broker="memory://", set_as_current=False)
    task = app.task(said, name="recipe", base=found["DatabaseTask"], shared=False)
    with ThreadPoolExecutor(2) as threads:
        sessions = list(threads.map(lambda _: task.session, range(2)))
    assert sessions[0] is sessions[1]


def test_faults_cost_what_was_counted() -> None:
    """As the text says: ours nothing, the recipe tasks by each of ten faults, and by none; every cell was run."""
    found = json.loads((ROOT / "docs" / "faults.json").read_text())["results"]
    damage: dict[tuple[str, str], int] = {}
    for one in found:
        assert not one["failed"], one
        key = (one["cell"]["fault"], one["cell"]["pattern"])
        damage[key] = damage.get(key, 0) + sum(one["damage"].values()) - one["damage"]["tasks"]
    faults = {fault for fault, _ in damage}
    assert len(faults) == 10 + 1
    for fault in faults:
        assert damage[fault, "celery-alchemy"] == 0 < damage[fault, "recipe"], fault
