"""The rules of the source tree: who imports whom, and what an import does."""

import ast
import functools
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import celery_alchemy
from celery_alchemy.workers.commands.installing import install

PACKAGE = Path(celery_alchemy.__file__).parent
FOLDERS = {"strategies", "workers", "loadtests"}
CELERY = {"celery", "billiard", "kombu", "vine", "amqp"}
#: Arrow: loadtests -> workers -> strategies. What a folder may import of the others.
ARROW = {"strategies": set(), "workers": {"strategies"}, "loadtests": {"strategies", "workers"}}
DRIVERS = {"psycopg", "psycopg2", "pymysql", "MySQLdb", "sqlite3"}
#: Modules of one driver, imported when it is selected.
OF_ONE_DRIVER = {
    "begin_psycopg.py": {"psycopg"}, "begin_awaited_psycopg.py": {"psycopg"}, "begin_psycopg2.py": {"psycopg2"},
    "awaited_psycopg.py": {"psycopg"}, "followed_psycopg.py": {"psycopg"}, "followed_psycopg2.py": {"psycopg2"},
}  # fmt: skip
GREEN = {"gevent", "eventlet"}
LONGEST_FILE, LONGEST_FUNCTION = 400, 60  # lines


def modules(folder: str) -> list[Path]:
    found = sorted((PACKAGE / folder).rglob("*.py"))
    assert found, f"nothing in {PACKAGE / folder}"
    return found


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the absolute name of every module that `path` imports, anywhere in its code, and the line."""
    package = ["celery_alchemy", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, node.module] if node.module else base)
            yield name, node.lineno
            yield from ((f"{name}.{alias.name}", node.lineno) for alias in node.names)


def offences(folder: str, wrong: Callable[[str], bool]) -> list[str]:
    found = ((path, *imported) for path in modules(folder) for imported in imports(path))
    return [f"{path.name}:{line} imports {name}" for path, name, line in found if wrong(name)]


@pytest.mark.parametrize("folder", sorted(ARROW))
def test_a_folder_imports_only_what_the_arrow_allows(folder: str) -> None:
    def wrong(name: str) -> bool:
        parts = name.split(".")
        others = FOLDERS - ARROW[folder] - {folder}
        return parts[0] == "tests" or (parts[0] == "celery_alchemy" and len(parts) > 1 and parts[1] in others)

    assert offences(folder, wrong) == []


def test_strategies_know_nothing_of_celery() -> None:
    assert offences("strategies", lambda name: name.split(".")[0] in CELERY) == []


def test_only_workers_and_loadtests_import_celery() -> None:
    """The package itself holds the public names, nothing else."""
    assert [name for name, _ in imports(PACKAGE / "__init__.py") if name.split(".")[0] in CELERY] == []
    assert any(name.split(".")[0] == "celery" for path in modules("workers") for name, _ in imports(path))


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_nobody_imports_the_folders_by_their_bare_names(folder: str) -> None:
    """From the checkout that would be a second copy of the module, with another class of the same name."""
    assert offences(folder, lambda name: name.split(".")[0] in FOLDERS) == []


def test_the_tests_import_the_folders_by_the_installed_name() -> None:
    wrong = []
    for path in Path(__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            wrong += [f"{path.name}:{node.lineno}" for name in names if name.split(".")[0] in FOLDERS]
    assert wrong == []


@pytest.mark.parametrize("folder", ["strategies", "workers"])
def test_drivers_and_green_libraries_are_imported_where_they_are_used(folder: str) -> None:
    """Never at the top of a module: none of them needs to be installed."""
    wrong = []
    for path in modules(folder):
        refused = (DRIVERS | GREEN) - OF_ONE_DRIVER.get(path.name, set())
        for node in parsed(path).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                wrong += [f"{path.name}:{node.lineno} {n}" for n in names if n.split(".")[0] in refused]
    assert wrong == []


IMPORT = """
import gc, json, signal, socket, sys, threading

import celery.signals
import sqlalchemy.event
from celery.utils.dispatch import Signal

before = {id(s): len(s.receivers or ()) for s in gc.get_objects() if isinstance(s, Signal)}
handlers = {n: signal.getsignal(n) for n in signal.valid_signals() if n not in (signal.SIGKILL, signal.SIGSTOP)}
listening = []
sqlalchemy.event.listen, sqlalchemy.event.listens_for = (lambda *a, **k: listening.append(a),) * 2

import celery_alchemy

from sqlalchemy import Engine
from sqlalchemy.pool import Pool
print(json.dumps({
    "public": sorted(celery_alchemy.__all__),
    "modules": sorted(sys.modules),
    "engines": sum(isinstance(o, (Engine, Pool)) for o in gc.get_objects()),
    "signals": [s.name for s in gc.get_objects() if isinstance(s, Signal)
                and len(s.receivers or ()) != before.get(id(s), 0)],
    "handlers": [int(n) for n, h in handlers.items() if signal.getsignal(n) is not h],
    "listening": len(listening),
    "threads": threading.active_count(),
    "patched": socket.socket.__module__ != "socket",
}))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, object]:
    """What `import celery_alchemy` does in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_makes_no_engine_connects_no_signal_and_patches_nothing(imported: dict[str, object]) -> None:
    quiet = {name: imported[name] for name in ("engines", "signals", "handlers", "listening", "threads", "patched")}
    assert quiet == {"engines": 0, "signals": [], "handlers": [], "listening": 0, "threads": 1, "patched": False}


def test_importing_imports_no_driver_and_no_green_library(imported: dict[str, object]) -> None:
    assert set(imported["modules"]) & (DRIVERS | GREEN | {"locust", "pydantic"}) == set()
    assert "celery_alchemy.loadtests" not in imported["modules"]


def test_the_public_names_are_there(imported: dict[str, object]) -> None:
    promised = {
        "Alchemy", "DatabaseTask", "SessionStrategy", "LocalStrategy", "ScopedStrategy", "PerProcessStrategy",
        "WorkerPool", "CeleryAlchemyError", "ConfigurationError", "NoUnitOfWork",
    }  # fmt: skip
    assert promised <= set(imported["public"])
    for name in imported["public"]:
        assert getattr(celery_alchemy, name).__doc__, f"{name} has no docstring"


def test_importing_the_package_needs_neither_drivers_nor_green_libraries() -> None:
    """With all of them impossible to import."""
    missing = sorted(DRIVERS - {"sqlite3"} | GREEN | {"greenlet", "locust", "pydantic", "psutil", "redis"})
    script = f"import sys; sys.modules.update(dict.fromkeys({missing!r})); import celery_alchemy"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr


def test_the_checkout_has_one_copy_of_each_module() -> None:
    """The links of the package lead to the folders at the top, or, in an installed wheel, are the folders."""
    for folder in sorted(FOLDERS):
        spec = importlib.util.find_spec(f"celery_alchemy.{folder}")
        assert spec is not None
        assert Path(spec.origin or "").resolve().parent == (PACKAGE / folder).resolve()


def test_every_module_has_a_docstring_and_a_bounded_length() -> None:
    """One idea per file, and one screen per function."""
    for path in (path for folder in sorted(FOLDERS) for path in modules(folder)):
        text = path.read_text()
        tree = parsed(path)
        assert len(text.splitlines()) <= LONGEST_FILE, f"{path.name} has more than one idea"
        assert ast.get_docstring(tree) or not text, f"{path.name} has no docstring"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                assert length <= LONGEST_FUNCTION, f"{path.name}: {node.name} has {length} lines"


def test_no_file_of_the_tests_is_longer_than_those_of_the_product() -> None:
    found = {path.name: len(path.read_text().splitlines()) for path in Path(__file__).parent.rglob("*.py")}
    assert {name: length for name, length in found.items() if length > LONGEST_FILE} == {}


LOCUST = PACKAGE / "loadtests" / "client"


def test_only_the_load_generator_imports_locust() -> None:
    """Importing Locust monkey-patches the process: never the orchestrator, the commands, a worker or these tests."""
    allowed = {*LOCUST.rglob("*.py"), PACKAGE / "loadtests" / "locustfile.py"}
    found = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for folder in sorted(FOLDERS)
        for path in modules(folder)
        for name, line in imports(path)
        if name.split(".")[0] == "locust" and path not in allowed
    ]
    assert found == []


COMMANDS = """
import json, sys
import celery_alchemy.loadtests, celery_alchemy.loadtests.bench.commands
celery_alchemy.loadtests.bench.commands.bench.main(["--help"], standalone_mode=False)
import celery_alchemy.loadtests.bench.runs, celery_alchemy.loadtests.services.harness, celery_alchemy.loadtests.reports
print(json.dumps([name for name in ("locust", "gevent", "eventlet", "matplotlib") if name in sys.modules]))
"""


def test_the_bench_commands_patch_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", COMMANDS], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


WITHOUT_EXTRA = """
import sys
sys.modules["rich"] = None  # as if it was not installed
from celery.bin.celery import celery
celery.main(["alchemy", *sys.argv[1:]])
"""


def test_a_command_without_its_extra_says_what_to_install() -> None:
    """`celery` itself goes on: its other commands do not need what a benchmark needs."""
    command = [sys.executable, "-c", WITHOUT_EXTRA]
    done = subprocess.run([*command, "bench", "--pools=solo"], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert f"celery alchemy bench needs rich: {install('loadtest')}." in said
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0
    said = f"Not installed: needs rich: {install('loadtest')}."
    assert "".join(said.split()) in "".join(done.stdout.split()), "click may break the path of a checkout at a hyphen"
