"""One run: its name, its temporary directory, its guard."""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .guard import Guard, remove_directory

SOCKET_PATH_LIMIT = 100  # Bytes the system allows for the path of a Unix socket: 108 on Linux, 104 on macOS


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Everything a run leaves on this machine, and who removes it if the run cannot."""

    path: Path
    id: str  # Unique among runs; part of every database and queue name
    guard: Guard


@contextmanager
def run_directory() -> Iterator[RunDirectory]:
    """Make a temporary directory with a guard; both are gone when the block ends, or when this process is killed."""
    run_id = secrets.token_hex(4)
    name = f"celery-alchemy-{run_id}"
    base = Path(tempfile.gettempdir())
    too_long = len(os.fsencode(base / name / "postgresql" / ".s.PGSQL.5432")) > SOCKET_PATH_LIMIT
    if too_long or (os.geteuid() == 0 and _closed_to_others(base)):
        base = Path("/tmp")  # noqa: S108 - the name is random, and mkdir fails if it is there.
    path = base / name
    guard = Guard()
    try:
        guard.watch(remove_directory, str(path))
        # Root's servers run as another account, which has to reach its own directory below this one.
        path.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700)
        yield RunDirectory(path, run_id, guard)
    finally:
        guard.close()


def _closed_to_others(path: Path) -> bool:
    return any(not place.stat().st_mode & stat.S_IXOTH for place in (path, *path.absolute().parents))
