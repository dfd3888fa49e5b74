"""What `--again` does, in CI: each test that failed is run once more, alone.

A race that only a busy machine loses does not fail CI then, and is not hidden: it is named in a line of its own. A test
that fails twice fails the run. So does a run in which anything but tests failed, or more of them than chance explains.
"""

import subprocess
import sys
from collections.abc import Iterator

import pytest

MOST = 8
"""So many tests may fail by chance; where more do, none is run again."""


class Again:
    """The run that is given `--again`: the process that reports, not those of pytest-xdist that run the tests."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._failed: dict[str, None] = {}
        self._collected = True

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._collected = self._collected and not report.failed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed[report.nodeid] = None

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Iterator[None]:
        """Run them again when the terminal has shown how they failed."""
        yield
        whole = session.exitstatus == pytest.ExitCode.TESTS_FAILED and self._collected and not session.shouldfail
        if whole and 0 < len(self._failed) <= MOST and self._pass_alone():
            for nodeid in self._failed:
                self._say(f"unsteady: {nodeid}, failed first, passed alone")
            session.exitstatus = pytest.ExitCode.OK

    def _pass_alone(self) -> bool:
        invocation = self._config.invocation_params
        given = [argument for argument in map(str, invocation.args) if argument != "--again"]
        only = [f"--only={nodeid}" for nodeid in self._failed]
        # The same arguments: which tests the covering set has depends on all that are collected.
        command = [sys.executable, "-m", "pytest", *given, "--numprocesses=0", *only]
        self._say(f"{len(self._failed)} failed: run again, alone")
        return subprocess.run(command, cwd=invocation.dir, check=False).returncode == 0

    def _say(self, line: str) -> None:
        writer = self._config.get_terminal_writer()
        writer.line(line)
        writer.flush()


class Only:
    """The run that is given `--only`: it fails unless each of these tests has passed; none is skipped, or not found."""

    def __init__(self, nodeids: list[str]) -> None:
        self._missing = set(nodeids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self._missing.discard(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._missing and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def add_options(parser: pytest.Parser) -> None:
    parser.addoption("--again", action="store_true", help="run the tests that failed once more, alone")
    parser.addoption("--only", action="append", default=[], metavar="ID", help="of the chosen tests only these")


def configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return
    if config.getoption("again"):
        config.pluginmanager.register(Again(config))
    if only := config.getoption("only"):
        config.pluginmanager.register(Only(only))
