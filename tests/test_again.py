"""`--again`, as CI runs the suite: a test that fails and then passes alone is named, and does not fail the run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.worker import TESTS

CONFTEST = """
from pathlib import Path
from support import again

def pytest_addoption(parser):
    again.add_options(parser)

def pytest_configure(config):
    again.configure(config)

def pytest_collection_modifyitems(config, items):
    items[:] = [item for item in items if item.nodeid in config.getoption("only") or not config.getoption("only")]
"""
FIRST = """
from pathlib import Path
import pytest
def is_first(name):
    first = not Path(name).exists()
    Path(name).touch()
    return first
"""
GOOD = "\ndef test_good(): pass\n"
RACE = "\ndef test_race(): assert not is_first('race')\n"
RACE_OF_A_FIXTURE = """
@pytest.fixture
def late():
    yield
    assert not is_first('late')
def test_late(late): pass
"""
GONE = "\ndef test_gone():\n    if not is_first('gone'): pytest.skip('no server')\n    assert False\n"
WRONG = "\ndef test_wrong(): assert False\n"
MANY = "\n@pytest.mark.parametrize('n', range(9))\ndef test_many(n): assert not is_first(str(n))\n"


def run(folder: Path, code: str, *arguments: str) -> tuple[int, list[str], str]:
    """Return the exit code, the tests that were said to be unsteady, and all that was said."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_some.py").write_text(FIRST + code)
    (folder / "pytest.ini").touch()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "pytest", "-p", "xdist", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    said = done.stdout + done.stderr
    return done.returncode, re.findall(r"^unsteady: (\S+), failed first, passed alone$", said, re.MULTILINE), said


@pytest.mark.parametrize("processes", ["0", "2"])
def test_who_passes_alone_is_named_and_fails_nothing(tmp_path: Path, processes: str) -> None:
    code, unsteady, said = run(tmp_path, GOOD + RACE + RACE_OF_A_FIXTURE, "--again", "--numprocesses", processes)
    assert (code, sorted(unsteady)) == (0, ["test_some.py::test_late", "test_some.py::test_race"]), said
    assert "assert not True" in said, "how it failed is shown"


@pytest.mark.parametrize(
    ("tests", "expected"),
    [
        pytest.param(GOOD + RACE + WRONG, 1, id="another fails twice"),
        pytest.param(GOOD + GONE, 1, id="skipped when it is alone"),
        pytest.param(GOOD + MANY, 1, id="more than chance explains"),
        pytest.param(GOOD + RACE + "\nraise SystemError\n", 2, id="not collected"),
        pytest.param("", 5, id="no tests"),
    ],
)
def test_what_fails_the_run_still(tmp_path: Path, tests: str, expected: int) -> None:
    code, unsteady, said = run(tmp_path, tests, "--again")
    assert (code, unsteady) == (expected, []), said


def test_nothing_is_run_again_unasked(tmp_path: Path) -> None:
    code, unsteady, said = run(tmp_path, GOOD + RACE)
    assert (code, unsteady) == (1, []), said
