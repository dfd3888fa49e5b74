"""Type checkers know what the public names are: mypy --strict and pyright, with celery-types."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
from mypy import api

HERE = Path(__file__).parent
TASKS = HERE / "typing" / "tasks.py"
MISTAKES = HERE / "typing" / "mistakes.py"
EXAMPLES = HERE.parent / "examples"


def wrong_lines() -> set[int]:
    lines = MISTAKES.read_text().splitlines()
    return {number for number, line in enumerate(lines, start=1) if line.endswith("# wrong")}


@pytest.fixture(scope="module")
def mypy_says(tmp_path_factory: pytest.TempPathFactory) -> str:
    cache = tmp_path_factory.mktemp("mypy")
    return api.run(["--strict", "--config-file=", f"--cache-dir={cache}", str(TASKS), str(MISTAKES)])[0]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment in which the package stands as `pip install` lays it, links resolved."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False, symlinks=True)
    (site,) = place.glob("lib/python*/site-packages")
    shutil.copytree(HERE.parent / "celery_alchemy", site / "celery_alchemy")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin" / "python"


def pyright(python: Path, *arguments: str, cwd: Path) -> dict[str, Any]:
    """Run it; its own Node.js comes from PyPI."""
    command = [sys.executable, "-m", "pyright", "--outputjson", *arguments]
    # It asks the `python` that it finds where packages are; --verifytypes looks at no option.
    path = os.pathsep.join([str(python.parent), os.environ.get("PATH", os.defpath)])
    environ = os.environ | {"PATH": path, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    environ.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, check=False, timeout=250)
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_mypy_knows_the_types_of_tasks(mypy_says: str) -> None:
    assert not re.findall(r"^.*tasks\.py:.*$", mypy_says, re.MULTILINE)


def test_mypy_finds_each_mistake_and_nothing_else(mypy_says: str) -> None:
    found = {int(line) for line in re.findall(r"mistakes\.py:(\d+): error", mypy_says)}
    assert found == wrong_lines(), mypy_says


def test_pyright_knows_them_too(installed: Path, tmp_path: Path) -> None:
    for file in (TASKS, MISTAKES):
        shutil.copy(file, tmp_path)
    found = pyright(installed, "tasks.py", "mistakes.py", cwd=tmp_path)["generalDiagnostics"]
    errors = [one for one in found if one["severity"] == "error"]
    assert {one["range"]["start"]["line"] + 1 for one in errors if "mistakes" in one["file"]} == wrong_lines()
    assert not [one for one in errors if "tasks" in one["file"]]


def test_the_examples_are_typed(tmp_path: Path) -> None:
    places = sorted(str(path) for path in EXAMPLES.rglob("*.py"))
    assert places
    for place in places:
        said, _, code = api.run(["--strict", "--config-file=", f"--cache-dir={tmp_path / 'cache'}", place])
        assert code == 0, said


def test_all_that_is_public_has_a_type(installed: Path, tmp_path: Path) -> None:
    found = pyright(installed, "--verifytypes", "celery_alchemy", "--ignoreexternal", cwd=tmp_path)["typeCompleteness"]
    without = [
        f"{symbol['name']}: {one['message']}"
        for symbol in found["symbols"]
        for one in symbol["diagnostics"]
        if one["severity"] == "error"
    ]
    assert found["completenessScore"] == 1, "\n".join(without[:40])
