"""The covering set misses no worker pool, strategy, driver, broker or ending, and CI runs all the rest of the suite."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Any

import pytest
from celery import concurrency
from support import covering, forking, scheduling
from support.worker import TESTS

Collected = list[dict[str, Any]]
ROOT = TESTS.parent
POOLS = set(concurrency.get_available_pool_names()) - {"processes", "custom"}
STRATEGIES = {entry.name for entry in entry_points(group="celery_alchemy.strategies")}
WANTED = {
    "worker pool": POOLS,
    "strategy": STRATEGIES,
    "driver": {*forking.DRIVERS, "sqlite"},
    "broker": {"redis", "rabbitmq"},
}


@pytest.fixture(scope="module")
def collected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Collected:
    """Every test of the suite, the values of its parameters, and whether the covering set has it."""
    if (tell := request.config.stash.get(covering.COLLECTED, None)) is not None:
        return tell()
    file = tmp_path_factory.mktemp("covering") / "collected"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", f"--list-tests={file}"]
    command += ["-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: Collected = json.loads(file.read_text())
    return found


def missing(collected: Collected) -> set[str]:
    """Return what the covering set does not meet."""
    have = words(covered(collected))
    found = {f"{kind} {word}" for kind, wanted in WANTED.items() for word in wanted - have}
    for name in {one["function"] for one in collected if one["function"].startswith("test_contract_")}:
        tests = [one for one in collected if one["function"] == name]
        all_, have = words(tests), words(covered(tests))
        # A test for one worker pool is met by the strategies its workers have; under prefork these are all.
        wanted = all_ if "prefork" in all_ else all_ - STRATEGIES
        found |= {f"{name}: {word}" for word in wanted - have}
        found |= set() if covered(tests) else {name}
    return found


def covered(collected: Iterable[dict[str, Any]]) -> Collected:
    return [one for one in collected if one["covered"]]


def words(collected: Iterable[dict[str, Any]]) -> set[str]:
    return {word for one in collected for word in one["words"]}


def test_the_covering_set_misses_nothing(collected: Collected) -> None:
    assert missing(collected) == set()


@pytest.mark.parametrize("word", [word for kind in WANTED for word in sorted(WANTED[kind])])
def test_what_it_would_miss_is_noticed(collected: Collected, word: str) -> None:
    without = [one | {"covered": one["covered"] and word not in one["words"]} for one in collected]
    assert any(line.endswith(f" {word}") for line in missing(without))


def test_an_ending_that_it_would_miss_is_noticed(collected: Collected) -> None:
    name = "test_contract_endings.py::test_raising_rolls_back"
    without = [one | {"covered": one["covered"] and one["function"] != name} for one in collected]
    assert name in missing(without)


def test_every_test_it_leaves_out_by_name_exists(collected: Collected) -> None:
    known = {name for one in collected for name in (one["function"], one["function"].partition("::")[0])}
    assert (covering.FULL_RUN_ONLY | covering.FEWER.keys()) - known == set()


def test_what_it_leaves_out_is_run_by_ci(collected: Collected) -> None:
    steps = re.findall(r"^ *make ([\w-]+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert steps.index("lint") < steps.index("test") < steps.index("test-rest")
    sizes = {target: re.findall(r"--tests (\w+)", recipe(target)) for target in ("test", "test-rest", "test-full")}
    assert sizes == {"test": ["covering"], "test-rest": ["rest"], "test-full": ["full"]}
    assert 0 < len(covered(collected)) < len(collected) / 2


@pytest.mark.parametrize(
    ("nodeid", "group"),
    [
        ("tests/test_contract_endings.py::test_returning_commits[local-gevent]", "local-gevent"),
        ("test_contract_endings.py::test_ignore_rolls_back[ignore-IGNORED-per_process-solo]", "per_process-solo"),
        ("tests/faults/test_limits.py::test_limits_that_strike_anywhere[prefork-local]", "test_limits"),
        ("tests/test_docs.py::test_links", "test_docs"),
    ],
)
def test_those_that_share_a_worker_stay_in_one_process(nodeid: str, group: str) -> None:
    assert scheduling.group_of(nodeid) == group


def recipe(target: str) -> str:
    command = ["make", "--dry-run", "--always-make", target]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=True).stdout
