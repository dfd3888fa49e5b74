"""The doctor on source files: small projects, each line that it has something against marked `# finds: code`."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import preloaded
from support.docs import DOCS

from celery_alchemy.workers.doctor.rules.catalogue import CATALOGUE
from celery_alchemy.workers.doctor.static import examine_path

PROJECTS = Path(__file__).parent / "doctor" / "projects"
MARK = re.compile(r"#.*\bfinds: ([\w-]+(?:, [\w-]+)*)")


def projects() -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each project: its name, and its files; the first one is tasks.py."""
    for path in sorted(PROJECTS.glob("*/*.txt")):
        first, *others = path.read_text().split("\n--- ")
        files = {"tasks.py": first} | {one.partition("\n")[0]: one.partition("\n")[2] for one in others}
        yield f"{path.parent.name}-{path.stem}", files


ALL = dict(projects())


def write(files: dict[str, str], folder: Path) -> set[tuple[str, str]]:
    """Write a project; return where the doctor is to find what."""
    expected = set()
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for number, line in enumerate(text.splitlines(), 1):
            for code in marked[1].split(", ") if (marked := MARK.search(line)) else ():
                expected.add((f"{path}:{number}", code))
    return expected


@pytest.mark.parametrize("name", sorted(ALL))
def test_what_is_marked_is_found_and_nothing_else(name: str, tmp_path: Path) -> None:
    expected = write(ALL[name], tmp_path)
    found = examine_path(tmp_path)
    assert {(one.where, one.code) for one in found.findings} == expected
    assert all(one.what and one.remedy for one in found.findings)


def examples() -> dict[str, str]:
    """Return the page's example of each code, and what all of them begin with under ''."""
    page = (DOCS / "doctor.md").read_text().partition("## Faults in code")[2].partition("\n## ")[0]
    parts = [one.partition("\n") for one in f" \n{page}".split("\n### ")]
    return {name.strip(): "\n".join(re.findall(r"```python\n(.*?)```", text, re.S)) for name, _, text in parts}


@pytest.mark.parametrize("code", sorted(CATALOGUE))
def test_the_page_has_an_example_of_each_code(code: str, tmp_path: Path) -> None:
    found = examples()
    text = found[code]
    expected = write({"tasks.py": f"{found['']}\n{text}" if text else "def broken(:  # finds: unreadable"}, tmp_path)
    assert {one for _, one in expected} == {code}
    # A file as a whole has no line.
    where = {(one.where if ":" in one.where else f"{one.where}:1", one.code) for one in examine_path(tmp_path).findings}
    assert where == expected


def test_every_code_is_met_by_a_project() -> None:
    marks = (mark for files in ALL.values() for text in files.values() for mark in MARK.findall(text))
    met = {code for mark in marks for code in mark.split(", ")}
    assert set(CATALOGUE) - met == {"on-commit-outside", "not-read", "unreadable"}, "those have tests of their own"


def call(*arguments: str) -> "subprocess.CompletedProcess[str]":
    code = "from celery_alchemy.workers.commands.console import main; main()"
    command = [sys.executable, "-c", code, "doctor", *arguments]
    return preloaded.run(command, cwd=Path(__file__).parent, env=os.environ, timeout=250)


DEEP = """
from celery import Celery
app = Celery("shop")
def f0(): f1()
def f1(): f2()
def f2(): f3()
def f3(): f4()
def f4(): f5()
def f5(): f6()
def f6(): ...
@app.task
def deep(): f0()
@app.task
def less_deep(): f2()
"""


def test_what_is_not_read_is_said(tmp_path: Path) -> None:
    """A task that calls too deep, or too much; in words, with the function that comes first."""
    write({"tasks.py": DEEP}, tmp_path)
    (found,) = examine_path(tmp_path).findings
    assert (found.code, found.level, found.where) == ("not-read", "note", f"{tmp_path}/tasks.py:12")
    assert "deep calls more than was read: after 5 calls, one in the other, the doctor" in found.what
    assert "f5() first" in found.what
    long = "\n".join(f"    x{number} = {number}" for number in range(5_100))
    tasks = f"def long():\n{long}\ndef last(): ...\n@app.task\ndef much():\n    long()\n    last()\n"
    write({"tasks.py": f"from celery import Celery\napp = Celery('shop')\n{tasks}"}, tmp_path)
    (found,) = examine_path(tmp_path).findings
    assert "much calls more than was read: after 5,000 statements, the doctor" in found.what
    assert "last() first" in found.what


def test_the_command(tmp_path: Path) -> None:
    """It imports nothing of the project, says what it has read, and its exit code is the app mode's."""
    write({"tasks.py": "import missing_package\n" + ALL["closing-never_closed"]["tasks.py"]}, tmp_path)
    done = call(str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"read 1 file in {tmp_path}: 1 task, 1 Engine, 1 session factory, 1 Session;" in done.stdout
    assert f"warning session-not-closed [{tmp_path}/tasks.py:11]" in done.stdout
    assert done.stdout.rstrip().endswith("0 errors, 1 warning")
    assert call(str(tmp_path), "--strict").returncode == 1
    write(ALL["sharing-module_session"], tmp_path)
    done = call(str(tmp_path / "db.py"), "--json", "--pool", "threads")
    found = json.loads(done.stdout)
    assert (done.returncode, found["files"], found["worker_pools"]) == (0, 1, ["threads"])
    done = call(str(tmp_path), "--json")
    assert (done.returncode, [one["code"] for one in json.loads(done.stdout)["findings"]]) == (1, ["global-session"])


@pytest.mark.parametrize("arguments", [["nowhere"], ["{}"], ["{}", "--pool", "procesess"]])
def test_bad_arguments(arguments: list[str], tmp_path: Path) -> None:
    done = call(*(one.format(tmp_path) for one in arguments))
    assert done.returncode == 2
    assert "Error" in done.stderr


def test_the_worker_pool_may_be_said(tmp_path: Path) -> None:
    """What is only wrong under one worker pool is told of that one."""
    write(ALL["engines-right_process_init_under_prefork"], tmp_path)
    assert examine_path(tmp_path).findings == []
    assert {one.code for one in examine_path(tmp_path, pool="threads").findings} == {"engine-in-process-init"}
    write(ALL["engines-create_all_at_import"], tmp_path)
    assert {one.code for one in examine_path(tmp_path, pool="prefork").findings} == {"engine-at-import"}
    assert examine_path(tmp_path, pool="threads").findings == []
