"""The files of a project: its modules by name, what is said in comments, and how its workers are started."""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_LEFT_OUT = {"node_modules", "site-packages", "dist-packages", "__pycache__", "build", "dist", "venv", "env", "tests"}
_TESTS = re.compile(r"(test_.*|.*_test|conftest|setup|noxfile)\.py")
_IGNORE = re.compile(r"#\s*alchemy:\s*ignore\b(?:\[([^\]]*)\])?")
#: No module of a project is meant by these names, even where one of its files is called so.
_LIBRARIES = {
    "celery",
    "sqlalchemy",
    "sqlmodel",
    "flask",
    "fastapi",
    "celery_alchemy",
    "redis",
    *sys.stdlib_module_names,
}
_COMMANDS = ("Procfile*", "Makefile", "Dockerfile*", "*compose*.y*ml", "*.sh", "*.service", "supervisor*", "*.ini")
POOLS = ("prefork", "threads", "gevent", "eventlet", "solo", "asyncio")
_POOL = re.compile(rf"\bcelery\b[^\n]*\bworker\b[^\n]*?(?:--pool|-P)[\s=\"',]*({'|'.join(POOLS)})")


@dataclass(slots=True, eq=False)
class Module:
    """A module of the project."""

    name: str
    path: Path
    tree: ast.Module
    ignored: dict[int, set[str]]
    """By line, the codes that a comment silences there."""

    def where(self, node: ast.AST) -> str:
        """Return file:line of `node`."""
        return f"{self.path}:{getattr(node, 'lineno', 1)}"

    def absolute(self, module: str | None, level: int) -> str:
        """Return the name that an import in this module means."""
        if not level:
            return module or ""
        package = self.name.split(".") if self.path.name == "__init__.py" else self.name.split(".")[:-1]
        return ".".join([*package[: len(package) - level + 1], *([module] if module else [])])


@dataclass(slots=True)
class Project:
    """All modules that were read."""

    modules: dict[str, Module] = field(default_factory=dict)
    unreadable: list[tuple[Path, str]] = field(default_factory=list)
    pools: set[str] = field(default_factory=set)
    """The worker pools that commands in the project's files name."""
    root: tuple[str, ...] = ()
    """The folder's path, whose last parts may be the first ones of imported names."""
    by_ending: dict[str, list[Module]] = field(default_factory=dict)

    def find(self, name: str) -> Module | None:
        """Return the module that is imported under `name`: from the project's root, or from a folder below it."""
        parts = name.split(".")
        if parts[0] in _LIBRARIES:
            return None
        if name in self.modules:
            return self.modules[name]
        for count in range(len(parts), 0, -1):
            if tuple(parts[:count]) == self.root[-count:]:
                found = self.modules.get(".".join(parts[count:]) or self.root[-1])
                if found is not None:
                    return found
        below = [one for one in self.by_ending.get(name, []) if one.name[: -len(name) - 1] not in self.modules]
        return min(below, key=lambda module: len(module.name)) if below else None

    def add(self, name: str, path: Path) -> None:
        """Read one file."""
        try:
            source = path.read_bytes()
            module = Module(name, path, ast.parse(source, str(path)), dict(_comments(source)))
        except (OSError, SyntaxError, ValueError) as failure:
            self.unreadable.append((path, str(failure)))
            return
        self.modules[name] = module
        parts = name.split(".")
        for start in range(1, len(parts)):
            self.by_ending.setdefault(".".join(parts[start:]), []).append(module)


def read_path(path: Path) -> Project:
    """Read a file, or all modules below a folder; tests and what is installed there are left out."""
    root = path if path.is_dir() else path.parent
    project = Project(root=root.resolve().parts)
    for file in sorted(_files(path)):
        parts = list(file.relative_to(root).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        project.add(".".join(parts) or project.root[-1], file)
    for pattern in _COMMANDS if path.is_dir() else ():
        for file in (*path.glob(pattern), *path.glob(f"*/{pattern}")):
            if file.is_file():
                project.pools |= set(_POOL.findall(file.read_text(errors="replace").replace("\\\n", " ")))
    return project


def read_files(files: Mapping[str, str]) -> Project:
    """Read modules whose names are known."""
    project = Project()
    for name, path in sorted(files.items()):
        project.add(name, Path(path))
    return project


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for one in sorted(path.iterdir()):
        if one.is_dir():
            if one.name not in _LEFT_OUT and not one.name.startswith(".") and not (one / "pyvenv.cfg").exists():
                yield from _files(one)
        elif one.suffix == ".py" and not _TESTS.fullmatch(one.name):
            yield one


def _comments(source: bytes) -> Iterator[tuple[int, set[str]]]:
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        found = _IGNORE.search(token.string) if token.type == tokenize.COMMENT else None
        if found is not None:
            yield token.start[0], {code.strip() for code in (found[1] or "").split(",")}
