"""SQLite across a fork: the file is shared, and a connection closed in the child would roll the parent back."""

import json
import sys
from pathlib import Path

import pytest
from support import forking, preloaded

CASES = [(whose, action) for action in ("exit", "sys_exit", "close", "dispose", "kill") for whose in ("url", "engine")]


# Only our journal (WAL) lets another process read meanwhile.
@pytest.mark.parametrize(("whose", "action"), [*CASES, ("url", "read")])
def test_child_of_a_sqlite_transaction(tmp_path: Path, action: str, whose: str) -> None:
    """With its own journal (`engine`) or ours (`url`), the parent's large transaction commits, the file is whole."""
    done = preloaded.run(
        [sys.executable, "-m", "scripts.fork_sqlite", str(tmp_path / "forks.db"), whose, action],
        env=forking.environment(),
        cwd=tmp_path,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"first": "changed", "rows": 301, "check": "ok"}


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("memory", {"child": 2, "rows": 1}),
        ("static", {"child": 2, "rows": 1}),
        ("file", {"child": 0, "rows": 301}),
        ("detached", {"child": 0, "rows": 301}),
    ],
)
def test_an_engine_that_nobody_told_of(tmp_path: Path, kind: str, found: dict[str, int]) -> None:
    """A file is the parent's until it commits; a database in memory is copied, and each process has its own."""
    done = preloaded.run(
        [sys.executable, "-m", "scripts.fork_sqlite_unknown", str(tmp_path / "forks.db"), kind],
        env=forking.environment(),
        cwd=tmp_path,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == found, done.stderr
