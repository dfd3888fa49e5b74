"""The Alchemy of a project: where it is made, from which Engine or URL; and the names that the tasks need."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import libcst as cst

from .leftovers import Leftovers, definitions
from .makers import Makers, Source
from .planning import ALCHEMY, CURRENT_SESSION, DATABASE_TASK
from .source import Imported, Module, Project, Ref, argument, bindings, code, statements_of, walk
from .tasks import Tasks

PLACEHOLDERS = {DATABASE_TASK: "DatabaseTask", CURRENT_SESSION: "CurrentSession"}
VARIABLES = ("db", "alchemy", "task_database", "celery_database")
"""The first that the files concerned do not use."""


class CannotWireError(Exception):
    """There is no place for the Alchemy."""


@dataclass(frozen=True, slots=True)
class Wiring:
    """Where the Alchemy is, and its name."""

    path: Path
    variable: str
    exists: bool
    """It was there before."""


def find_place(project: Project, makers: Makers, tasks: Tasks, users: list[Module]) -> Wiring:
    """Return where the Alchemy is to be made: beside the one Celery app of the project.

    Raises:
        CannotWireError: there is not one app, or a module would import itself in a circle.
    """
    for module in project.modules:
        for name, values in module.names.items():
            for value in values:
                if isinstance(value, cst.Call) and makers.outside(module, value.func) == "celery_alchemy.Alchemy":
                    return Wiring(module.path, name, exists=True)
    apps = tasks.apps()
    if len(apps) != 1:
        found = ", ".join(f"{ref.module.shown}: {ref.name}" for ref in apps if ref.module is not None) or "none"
        raise CannotWireError(f"the project must have one Celery app at the top of a module; found: {found}")
    home = apps[0].module
    assert home is not None
    words = {word for one in [home, *users] for word in re.findall(r"\w+", one.source)}
    if home.is_package:  # importing `shop.db` gives the package `shop` a name of its own
        words |= {path.stem for path in home.path.parent.iterdir()}
    variable = next((name for name in VARIABLES if name not in words), None)
    if variable is None:
        raise CannotWireError(f"the names {', '.join(VARIABLES)} are all in use")
    return Wiring(home.path, variable, exists=False)


def check_existing(module: Module, wiring: Wiring, makers: Makers, source: Source, shared: Ref | None) -> None:
    """Check that the Alchemy which is there is for the Engine of the tasks.

    Raises:
        CannotWireError: it is for another one, or that is not certain.
    """
    call = module.bound(wiring.variable)
    given = argument(call, "engine") if isinstance(call, cst.Call) else None
    engine = makers.engine(module, given.value) if given is not None else None
    if engine is None or (engine.module, engine.name) != (source.engine.module, source.engine.name):
        raise CannotWireError(
            f"{module.shown} has an Alchemy already, and it is not made with engine={source.engine.name}"
        )
    given = argument(call, "session_factory") if isinstance(call, cst.Call) else None
    maker = makers.of_maker(module, given.value) if given is not None else None
    wanted = _session_options(source)
    if (maker.database != source.database) if maker is not None else (_options_of(module) != wanted):
        raise CannotWireError(f"{module.shown} has an Alchemy already, with other options of its Session: {wanted}")
    if shared is not None and f".share({shared.name})" not in module.source:
        raise CannotWireError(f"{module.shown} has an Alchemy already, without {wiring.variable}.share({shared.name})")


def _options_of(module: Module) -> str:
    line = next((one for one in module.source.splitlines() if "alchemy_session_options" in one), "")
    return line[line.find("alchemy_session_options") :].strip() if line else ""


def _session_options(source: Source) -> str:
    """Return the setting for the options of a Session that differ from ours; empty for none."""
    options = {"expire_on_commit": "True"} | dict(source.options)
    options.pop("autocommit", None)
    text = ", ".join(f'"{name}": {value}' for name, value in options.items())
    return "" if options == {"expire_on_commit": "False"} else f"alchemy_session_options = {{{text}}}"


class Wirer:
    """Writes the Alchemy into the module of the app, and imports into the modules that need them."""

    def __init__(self, rest: Leftovers, wiring: Wiring, source: Source, shared: Ref | None, app: str) -> None:
        self._rest, self._wiring, self._source, self._shared, self._app = rest, wiring, source, shared, app

    def write(self) -> None:
        """Make the Alchemy.

        Raises:
            CannotWireError: its Engine cannot be imported there.
        """
        path = self._wiring.path
        module = self._rest.modules[path]
        imports: list[tuple[Path, str]] = []
        lines = self._lines(module, imports)
        module = self._rest.modules[path]
        for other, _ in imports:
            if other != path and reaches(self._rest, other, path):
                shown = self._rest.modules[other].shown
                raise CannotWireError(f"{module.shown} would import {shown}, which imports {module.shown}")
        here = {name for other, name in imports if other == path}
        position = self._position(module, here)
        body = list(module.tree.body)
        made = [cst.parse_statement(line) for line in lines]
        spaced = [made[0].with_changes(leading_lines=[cst.EmptyLine(indent=False)]), *made[1:]]
        tree = module.tree.with_changes(body=[*body[:position], *spaced, *body[position:]])
        text = add_import(tree.code, "celery_alchemy", "Alchemy")
        for other, name in imports:
            if other != path:
                text = add_import(text, import_name(self._rest.project, module, self._rest.modules[other]), name)
        for name, target in self._foreign:
            text = add_foreign(text, name, target)
        self._rest.texts[path] = text
        self._rest.read_again()

    _foreign: tuple[tuple[str, str], ...] = ()

    def _lines(self, module: Module, imports: list[tuple[Path, str]]) -> list[str]:
        """Return the statements; note what they need of the project."""
        variable, app, source = self._wiring.variable, self._app, self._source
        engine_path = _path(source.engine)
        maker = source.maker
        if maker is not None and not definitions(self._rest.modules[_path(maker)], maker.name):
            maker = None
        by_url = maker is None and not self._rest.is_used((engine_path, source.engine.name))
        late = not definitions(self._rest.modules[engine_path], source.engine.name)
        lines = []
        if by_url or late or self._only_none(engine_path, source.engine.name):
            lines += self._by_url(module, imports)
            self._rest.remove({(engine_path, source.engine.name)}) if by_url else None
            arguments, maker = [app], None
        else:
            imports.append((engine_path, source.engine.name))
            arguments = [app, f"engine={source.engine.name}"]
        if maker is not None:
            imports.append((_path(maker), maker.name))
            factory = f"{maker.name}.session_factory" if source.scoped else maker.name
            arguments.append(f"session_factory={factory}")
        else:
            lines += self._options(arguments)
        lines.append(f"{variable} = Alchemy({', '.join(arguments)})")
        if self._shared is not None:
            if (_path(self._shared), self._shared.name) not in imports:
                imports.append((_path(self._shared), self._shared.name))
            lines.append(f"{variable}.share({self._shared.name})")
        return lines

    def _only_none(self, path: Path, name: str) -> bool:
        """Tell whether a name is None at the top, and is given its value by a function."""
        module = self._rest.modules[path]
        top = [
            value for one in statements_of(module.tree.body) for bound, value in bindings(one, module) if bound == name
        ]
        return all(not isinstance(value, cst.Call) for value in top)

    def _options(self, arguments: list[str]) -> list[str]:
        if self._source.session_class != "sqlalchemy.orm.Session":
            name = self._source.session_class.rpartition(".")[2]
            arguments.append(f"session_factory={name}")
            self._foreign = (*self._foreign, (name, self._source.session_class))
        text = _session_options(self._source)
        return [f"{self._app}.conf.{text}"] if text else []

    def _by_url(self, module: Module, imports: list[tuple[Path, str]]) -> list[str]:
        """The URL and the options of `create_engine`, for an Engine that only tasks use."""
        engine = self._source.engine
        call = engine.value
        assert engine.module is not None
        assert isinstance(call, cst.Call)
        url = argument(call, "url") or next((arg for arg in call.args if arg.keyword is None), None)
        if url is None:
            raise CannotWireError(f"the URL of {engine.name} is not found")
        options = [arg for arg in call.args if arg is not url]
        if any(arg.keyword is None for arg in options):
            raise CannotWireError(f"the options of {engine.name} are passed by `**`")
        lines = [f"{self._app}.conf.alchemy_database_url = {code(url.value)}"]
        pairs = [f'"{arg.keyword.value}": {code(arg.value)}' for arg in options if arg.keyword is not None]
        if pairs:
            lines.append(f"{self._app}.conf.alchemy_engine_options = {{{', '.join(pairs)}}}")
        if engine.module.path != module.path:
            self._names_of(engine.module, [url, *options], imports)
        else:
            names = {node.value for arg in (url, *options) for node in walk(arg.value) if isinstance(node, cst.Name)}
            imports += [(module.path, name) for name in names if definitions(module, name)]
        return lines

    def _names_of(self, module: Module, args: list[cst.Arg], imports: list[tuple[Path, str]]) -> None:
        names = {node.value for arg in args for node in walk(arg.value) if isinstance(node, cst.Name)}
        for name in sorted(names):
            for value in module.names.get(name, ()):
                if isinstance(value, Imported):
                    found = self._rest.project.lookup(value.target.split("."), module)
                    if found is not None and found.module is not None and found.name:
                        imports.append((found.module.path, found.name))
                    else:
                        self._foreign = (*self._foreign, (name, value.target))
                else:
                    imports.append((module.path, name))

    def _position(self, module: Module, needed: set[str]) -> int:
        """Return the index after the app, after what is done to it next, and after the names that are needed."""
        last = 0
        started = False
        for index, one in enumerate(module.tree.body):
            names = {name for small in statements_of([one]) for name, _ in bindings(small, module)}
            root = code(one).lstrip().partition("(")[0].partition("=")[0]
            if self._app in names:
                started, last = True, index + 1
            elif started and root.split(".")[0].strip() == self._app:
                last = index + 1
            elif isinstance(one, cst.SimpleStatementLine | cst.FunctionDef | cst.ClassDef) and names & needed:
                last = max(last, index + 1)
                started = started and last == index + 1
            else:
                started = False
        return last


def imported_modules(project: Project, module: Module, statements: Iterable[cst.CSTNode]) -> list[Path]:
    """Return the modules of the project that statements of a module import."""
    found = []
    for statement in statements:
        if isinstance(statement, cst.Import | cst.ImportFrom):
            targets = [value.target for _, value in bindings(statement, module) if isinstance(value, Imported)]
            if isinstance(statement, cst.Import):
                targets += [code(alias.name) for alias in statement.names]
            for target in targets:
                one = project.find(target, module) or project.find(target.rpartition(".")[0] or target, module)
                found += [one.path] if one is not None and one is not module else []
    return found


def resolve_placeholders(rest: Leftovers, wiring: Wiring) -> None:
    """Put the names in place, with their imports."""
    for path, text in list(rest.texts.items()):
        if "__adopted" not in text:
            continue
        changed = text
        module = rest.modules[path]
        for placeholder, name in PLACEHOLDERS.items():
            if placeholder not in changed:
                continue
            if name in module.names and not _is_ours(module, name):
                changed = add_foreign(changed.replace(placeholder, f"celery_alchemy.{name}"), None, "celery_alchemy")
            else:
                changed = add_import(changed.replace(placeholder, name), "celery_alchemy", name)
        if ALCHEMY in changed:
            changed = changed.replace(ALCHEMY, wiring.variable)
            if path != wiring.path:
                check_order(rest, wiring, path)
                target = import_name(rest.project, module, rest.modules[wiring.path])
                changed = add_import(changed, target, wiring.variable)
        rest.texts[path] = changed
    rest.read_again()


def check_order(rest: Leftovers, wiring: Wiring, user: Path) -> None:
    """Check that a module can import the Alchemy, where the module of the app imports it in turn.

    Raises:
        CannotWireError: the app's module imports it before it makes the Alchemy.
    """
    home = rest.modules[wiring.path]
    for statement in statements_of(home.tree.body):
        if any(name == wiring.variable for name, _ in bindings(statement, home)):
            return
        if isinstance(statement, cst.Import | cst.ImportFrom):
            for path in imported_modules(rest.project, home, [statement]):
                if reaches(rest, path, user):
                    shown = rest.modules[user].shown
                    raise CannotWireError(f"{home.shown} imports {shown} before it makes its app")


def reaches(rest: Leftovers, start: Path, goal: Path) -> bool:
    """Tell whether importing one module imports another."""
    seen: set[Path] = set()
    waiting = [start]
    while waiting:
        path = waiting.pop()
        if path == goal:
            return True
        if path not in seen and path in rest.modules:
            seen.add(path)
            module = rest.modules[path]
            waiting += imported_modules(rest.project, module, statements_of(module.tree.body))
    return False


def _path(ref: Ref) -> Path:
    assert ref.module is not None
    return ref.module.path


def _is_ours(module: Module, name: str) -> bool:
    values = module.names.get(name, ())
    return all(isinstance(value, Imported) and value.target == f"celery_alchemy.{name}" for value in values)


def import_name(project: Project, module: Module, target: Module) -> str:
    """Return how `module` names `target` in an import: as code that is there does, or by their folders."""
    for one in (module, *project.modules):
        for node in walk(one.tree):
            if isinstance(node, cst.ImportFrom) and node.module is not None and not node.relative:
                if project.find(code(node.module), one) is target:
                    return code(node.module)
            elif isinstance(node, cst.ImportFrom) and one.path.parent == module.path.parent and node.relative:
                name = f"{'.' * len(node.relative)}{code(node.module) if node.module is not None else ''}"
                if (
                    node.module is not None
                    and project.find(one.absolute(node.module, len(node.relative)), one) is target
                ):
                    return name
    if target.path.parent == module.path.parent and (module.path.parent / "__init__.py").exists():
        return f".{target.path.stem}"
    parts = [target.path.stem] if not target.is_package else []
    folder = target.path.parent
    while (folder / "__init__.py").exists():
        parts.insert(0, folder.name)
        folder = folder.parent
    return ".".join(parts)


def add_import(text: str, module: str, name: str) -> str:
    """Return the text with `from module import name`: in an import of that module, or in a line of its own."""
    tree = cst.parse_module(text)
    body = list(tree.body)
    for index, line in enumerate(body):
        if not isinstance(line, cst.SimpleStatementLine) or len(line.body) != 1:
            continue
        only = line.body[0]
        if not isinstance(only, cst.ImportFrom) or isinstance(only.names, cst.ImportStar):
            continue
        spelled = "." * len(only.relative) + (code(only.module) if only.module is not None else "")
        if spelled == module and all(alias.asname is None for alias in only.names):
            names = sorted({alias.name.value for alias in only.names if isinstance(alias.name, cst.Name)} | {name})
            aliases = [cst.ImportAlias(cst.Name(one)) for one in names]
            body[index] = line.with_changes(body=[only.with_changes(names=aliases)])
            return tree.with_changes(body=body).code
    return _insert_import(tree, f"from {module} import {name}\n")


def is_used(statement: cst.CSTNode, name: str) -> bool:
    """Tell whether a statement uses a name."""
    return any(isinstance(node, cst.Name) and node.value == name for node in walk(statement))


def add_foreign(text: str, name: str | None, target: str) -> str:
    """Return the text with an import of something from another package."""
    package, _, last = target.rpartition(".")
    if name is None or not package:
        line = f"import {target}\n" if name in {None, target} else f"import {target} as {name}\n"
        return text if f"\n{line}" in f"\n{text}" else _insert_import(cst.parse_module(text), line)
    if last == name:
        return add_import(text, package, name)
    return _insert_import(cst.parse_module(text), f"from {package} import {last} as {name}\n")


def _insert_import(tree: cst.Module, line: str) -> str:
    """Insert an import after those before the first function, and before the name is used.

    Not simply at the top: there a module may patch for gevent first.
    """
    position = 0
    name = line.rsplit(maxsplit=1)[-1].rpartition(".")[2]
    for index, one in enumerate(tree.body):
        small = one.body[0] if isinstance(one, cst.SimpleStatementLine) else None
        if isinstance(small, cst.Import | cst.ImportFrom):
            position = index + 1
        elif index == 0 and isinstance(small, cst.Expr) and isinstance(small.value, cst.SimpleString):
            position = 1
        elif isinstance(one, cst.FunctionDef | cst.ClassDef) or is_used(one, name):
            break
    body = [*tree.body[:position], cst.parse_statement(line), *tree.body[position:]]
    return tree.with_changes(body=body).code
