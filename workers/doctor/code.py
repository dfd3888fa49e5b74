"""The files of an imported project: those of its tasks and app, and those beside them."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from celery import Celery, Task

_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_OURS = "celery_alchemy."


def tasks_of(app: Celery) -> dict[str, Task[..., Any]]:
    """Return the project's tasks, by name."""
    return {name: task for name, task in app.tasks.items() if not name.startswith("celery.")}


def files_of(app: Celery) -> dict[str, str]:
    """Return, by name, the files of the project's modules that define tasks, task classes or the app, and those beside
    them, as far as they are imported.

    What was installed is no part of the project. A module without source is left out.
    """
    names: set[Any] = {getattr(task.run, "__module__", None) for task in tasks_of(app).values()}
    names |= {cls.__module__ for task in tasks_of(app).values() for cls in type(task).__mro__}
    packages = {str(name).partition(".")[0] for name in names if name}
    names |= {name for name in list(sys.modules) if name.partition(".")[0] in packages}
    for name, module in list(sys.modules.items()):
        if any(value is app for value in list(getattr(module, "__dict__", {}).values())):
            names.add(name)
    found = _files(names)
    beside = {Path(path).parent for path in found.values()}
    names |= {name for name in list(sys.modules) if (path := _file(sys.modules[name])) and Path(path).parent in beside}
    return _files(names)


def _files(names: set[Any]) -> dict[str, str]:
    found = {str(name): _file(sys.modules.get(name)) for name in names}
    return {name: path for name, path in found.items() if path is not None}


def _file(module: ModuleType | None) -> str | None:
    path = getattr(module, "__file__", None)
    if module is None or not path or not path.endswith(".py") or module.__name__.startswith(_OURS):
        return None
    if path.startswith(_LIBRARIES) and ("site-packages" in path or "dist-packages" in path):
        return None
    return str(path)
