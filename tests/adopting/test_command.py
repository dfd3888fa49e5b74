"""The command `celery-alchemy adopt`: what it prints, its exit codes, and its page in the docs."""

import sys
from pathlib import Path

import pytest
from adopting.test_adopting import ALL
from click.testing import CliRunner
from support.adopting import DOCS_EXAMPLE, Shape, texts, write

from celery_alchemy.workers.adopting import adopt
from celery_alchemy.workers.commands.console import main
from celery_alchemy.workers.commands.installing import install

BY_NAME = {shape.name: shape for shape in ALL}
PAGE = Path(__file__).parents[2] / "docs" / "adopt.md"


def test_a_diff_writes_nothing(tmp_path: Path) -> None:
    package = write(BY_NAME["factory_try_finally"], tmp_path)
    before = texts(package)
    done = CliRunner().invoke(main, ["adopt", str(tmp_path), "--diff"])
    assert done.exit_code == 0, done.output
    assert "+++ b/shop/tasks.py" in done.output
    assert "1 task would be rewritten, 0 tasks left as they are" in done.output
    assert texts(package) == before


@pytest.mark.parametrize("folder", ["shop-1.2", "my project", "a.b/c", ".checkout"])
@pytest.mark.parametrize("name", ["factory_try_finally", "recipe"])
def test_a_project_may_stand_in_any_folder(tmp_path: Path, folder: str, name: str) -> None:
    """A dot in its name is no package, and a name may be imported from the folder itself."""
    place = tmp_path / folder
    write(BY_NAME[name], place)
    done = CliRunner().invoke(main, ["adopt", str(place)])
    assert done.exit_code == 0, done.output
    assert "1 task rewritten" in done.output


def test_what_is_refused_is_said_and_gives_exit_code_1(tmp_path: Path) -> None:
    write(BY_NAME["threads"], tmp_path)
    done = CliRunner().invoke(main, ["adopt", str(tmp_path)])
    assert done.exit_code == 1
    assert "shop/tasks.py:14: work stays as it is: it uses concurrent.futures.ThreadPoolExecutor" in done.output


def test_nothing_to_do_gives_exit_code_0(tmp_path: Path) -> None:
    write(BY_NAME["adopted_self_db"], tmp_path)
    done = CliRunner().invoke(main, ["adopt", str(tmp_path)])
    assert (done.exit_code, done.output) == (0, "0 tasks rewritten, 0 tasks left as they are\n")


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    write(BY_NAME["with_factory"], tmp_path)
    (tmp_path / "old.py").write_text("print 'Python 2'\n")
    done = CliRunner().invoke(main, ["adopt", str(tmp_path)])
    assert done.exit_code == 1
    assert "old.py:1: cannot be read" in done.output
    assert "1 task rewritten" in done.output


def test_without_libcst_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "libcst", None)
    done = CliRunner().invoke(main, ["adopt", str(tmp_path)])
    assert done.exit_code == 2
    assert f"adopt needs libcst: {install('adopt')}." in " ".join(done.output.split())


def test_nothing_of_the_project_is_imported(tmp_path: Path) -> None:
    package = write(BY_NAME["factory_try_finally"], tmp_path)
    for name in ("app.py", "db.py", "models.py"):
        (package / name).write_text(f"{(package / name).read_text()}\nraise SystemExit('imported')\n")
    assert adopt(tmp_path, write=False).rewritten == 1


def test_definitions_that_the_rest_of_the_repository_uses_stay(tmp_path: Path) -> None:
    package = write(BY_NAME["made_by_a_function"], tmp_path)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "script.py").write_text("from shop.db import get_session\n")
    adopt(package, write=True)
    assert "def get_session" in (package / "db.py").read_text()


def test_windows_line_endings_stay(tmp_path: Path) -> None:
    package = write(BY_NAME["with_factory"], tmp_path)
    path = package / "tasks.py"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    adopt(tmp_path, write=True)
    written = path.read_bytes()
    assert b"CurrentSession" in written
    assert written.count(b"\n") == written.count(b"\r\n")


def test_the_example_of_the_docs(tmp_path: Path) -> None:
    """Each line that the page shows as added or removed is."""
    write(Shape("docs", **DOCS_EXAMPLE), tmp_path)
    found = {line.strip() for change in adopt(tmp_path, write=False).changes for line in change.diff().splitlines()}
    example = PAGE.read_text().partition("```diff\n")[2].partition("```")[0]
    shown = {line.strip() for line in example.splitlines() if line[:1] in "+-" and line.strip("+- ")}
    assert len(shown) > 10
    assert shown <= found, shown - found


def test_a_helper_with_a_session_of_its_own_is_told(tmp_path: Path) -> None:
    """Beside a task that is rewritten, too; that alone is no exit code."""
    package = write(BY_NAME["a_helper_with_a_session_of_its_own"], tmp_path)
    done = CliRunner().invoke(main, ["adopt", str(tmp_path), "--diff"])
    beside = "shop/tasks.py:17: one is rewritten, and audit(), which it calls, opens a Session of its own"
    assert f"{beside} (shop/saving.py:26): let it take" in done.output
    assert "work stays as it is" in done.output
    assert done.exit_code == 1
    tasks = (package / "tasks.py").read_text()
    (package / "tasks.py").write_text(tasks.replace("    save(key, n)\n", ""))
    done = CliRunner().invoke(main, ["adopt", str(tmp_path), "--diff"])
    assert "one is rewritten, and audit()" in done.output
    assert done.exit_code == 0


def test_a_session_of_a_module_in_a_helper_is_told(tmp_path: Path) -> None:
    """A scoped_session, and Flask-SQLAlchemy's, where the task itself uses none."""
    tasks = "from .app import app\nfrom .saving import save\n\n\n@app.task\ndef work():\n    save()\n"
    package = write(Shape("module", tasks), tmp_path)
    imports = "from sqlalchemy.orm import scoped_session\nfrom .db import SessionLocal\n\n"
    scoped = f"{imports}Scoped = scoped_session(SessionLocal)\n"
    flask = "from flask_sqlalchemy import SQLAlchemy\n\ndb = SQLAlchemy()\n"
    for module, use, said in (
        (scoped, "Scoped.commit()", "save(), which it calls, uses Scoped, a Session of its module (shop/saving.py:7)"),
        (flask, "db.session.commit()", "save(), which it calls, uses Flask-SQLAlchemy's Session (shop/saving.py:6)"),
    ):
        (package / "saving.py").write_text(f"{module}\ndef save():\n    {use}\n")
        (refused,) = adopt(tmp_path, write=False).refused
        assert refused.startswith(f"shop/tasks.py:6: work stays as it is: {said}")


def test_a_task_that_was_refused_is_rewritten_once_it_can_be(tmp_path: Path) -> None:
    """The Alchemy of the first run serves it."""
    package = write(BY_NAME["with_factory"], tmp_path)
    path = package / "tasks.py"
    task = "@app.task\ndef late(key):\n    with SessionLocal() as db:\n        kept.append(db)\n        db.commit()\n"
    path.write_text(f"{path.read_text()}\n\nkept = []\n\n\n{task}")
    first = adopt(tmp_path, write=True)
    assert (first.rewritten, len(first.refused)) == (1, 1)
    assert "session_factory=SessionLocal" in (package / "app.py").read_text()
    path.write_text(path.read_text().replace("kept.append(db)", "db.flush()"))
    second = adopt(tmp_path, write=True)
    assert (second.rewritten, second.refused) == (1, ())
    assert [change.shown for change in second.changes] == ["shop/tasks.py"]
    assert path.read_text().count("db: CurrentSession") == 2
