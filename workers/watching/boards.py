"""Where prefork's pool processes write what they are doing, and who makes and removes that place."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path

from ...strategies.watching import board
from ...strategies.watching.activity import activities
from .. import apps

logger = logging.getLogger(__name__)

#: For pool processes, forked or spawned: the folder, and the worker's main process, whose child alone is meant.
ENVIRONMENT = "CELERY_ALCHEMY_BOARDS"
_PREFIX = "celery-alchemy-"


def make() -> None:
    """Make the place, in the worker's main process; without one, `inspect sessions` shows less and all else works."""
    remove()
    try:
        _remove_orphans()
        path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
        board.make_folder(path)
    except OSError as error:
        logger.warning("No folder for the state of pool processes (%s): celery inspect sessions cannot show it", error)
        return
    os.environ[ENVIRONMENT] = f"{os.getpid()}:{path}"


def folder() -> Path | None:
    """Return the place; None where this is no main process of prefork."""
    owner, _, path = os.environ.get(ENVIRONMENT, "").partition(":")
    return Path(path) if owner == str(os.getpid()) and path else None


def write_here() -> None:
    """Let this pool process write."""
    owner, _, path = os.environ.get(ENVIRONMENT, "").partition(":")
    if not path or owner == str(os.getpid()):
        return
    try:
        activities.board, activities.obey = board.Board(Path(path)), recycle_all
    except OSError as error:
        logger.warning("This pool process cannot write its state (%s): celery inspect sessions leaves it out", error)


def recycle_all() -> None:
    """Let no connection that is open in this process now serve another unit of work."""
    for db in apps.every():
        if db._strategy is not None:
            db._strategy.recycle()


def remove() -> None:
    """Remove the place, where this process has made it."""
    path = folder()
    if path is not None:
        del os.environ[ENVIRONMENT]
        shutil.rmtree(path, ignore_errors=True)


def _remove_orphans() -> None:
    """Remove what workers that were killed have left: theirs had no chance."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}[0-9]*-*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and path.is_dir() and path.stat().st_uid == os.getuid() and not board.is_alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)
