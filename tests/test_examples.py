"""The projects below examples/, started as their first lines say, over real servers."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from support import preloaded
from support.databases import PostgreSQL
from support.waiting import eventually
from support.worker import Site, start_process, stop_process

EXAMPLES = Path(__file__).parent.parent / "examples"
WEB = {"flask_app": ["flask", "--app", "shop", "run", "--port"], "fastapi_app": ["uvicorn", "shop:api", "--port"]}


class Shop:
    """One of the examples: its folder, its worker, its web server."""

    def __init__(self, name: str, site: Site, database: PostgreSQL, folder: Path, stack: ExitStack) -> None:
        self.name, self.database, self.folder, self._stack = name, database, folder, stack
        queue = f"{site.prefix[:-1]}-{name}"
        shutil.copytree(EXAMPLES / name, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        settings = {"task_default_queue": queue, "broker_transport_options": {"global_keyprefix": site.prefix}}
        (made,) = (path for path in folder.rglob("*.py") if "\napp = Celery(" in path.read_text())
        code = re.sub("^(app = Celery.*)$", rf"\1\napp.conf.update({settings!r})", made.read_text(), flags=re.M)
        made.write_text(code)
        self.environment = {
            "SHOP_DATABASE_URL": database.url(queue),
            "SHOP_REPORTS_URL": database.url(queue),
            "SHOP_BROKER": site.urls.celery,
            "PYTHONPATH": str(folder),
        }

    def start(self, *command: str, ready: str) -> None:
        log = self.folder / f"{command[0]}.log"
        process = start_process([sys.executable, "-m", *command], log, self.environment)
        self._stack.callback(stop_process, process)

        def is_ready() -> bool:
            assert process.poll() is None, log.read_text()
            return log.exists() and ready in log.read_text()

        eventually(is_ready, f"{command[0]} is ready", within_s=60)

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, **self.environment}
        return preloaded.run([sys.executable, "-m", *command], cwd=self.folder, env=environment, timeout=250)

    def start_web(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        if self.name == "flask_app":
            done = self.run("flask", "--app", "shop", "create-tables")
            assert done.returncode == 0, done.stderr
        ready = "Running on" if self.name == "flask_app" else "Uvicorn running on"
        self.start(*WEB[self.name], str(self.port), ready=ready)

    def start_worker(self) -> None:
        module = "shop.worker" if self.name == "flask_app" else "shop"
        self.start("celery", "-A", module, "worker", "-c", "2", "-l", "info", ready=" ready.")

    def post(self, user: str) -> int:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/users/{user}", method="POST")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def users(self) -> dict[str, list[str]]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/users", timeout=30) as answer:
            found: dict[str, list[str]] = json.load(answer)
            return found


@pytest.fixture
def shop(request: pytest.FixtureRequest, site: Site, run_database: PostgreSQL, tmp_path: Path) -> Iterator[Shop]:
    with ExitStack() as stack:
        yield Shop(request.param, site, run_database, tmp_path, stack)
    for table in ("shop_users", "shop_welcomes"):
        with suppress(Exception):
            run_database.execute(f"DROP TABLE {table}")


@pytest.mark.parametrize("shop", sorted(WEB), indirect=True)
def test_a_web_application(shop: Shop) -> None:
    shop.start_web()
    shop.start_worker()
    names = [f"user{number}" for number in range(5)]
    for name in names:
        assert shop.post(f"bad-{name}") == 400
        assert shop.post(name) == 200
    eventually(lambda: len(shop.users()["welcomed"]) >= len(names), "all are welcomed")
    found = shop.users()
    assert found["users"] == names
    assert sorted(found["welcomed"]) == names, "and none of those that were rolled back"
    assert found["too_early"] == []


@pytest.mark.parametrize("shop", ["two_databases"], indirect=True)
def test_two_databases(shop: Shop) -> None:
    done = [shop.run("shop", *arguments) for arguments in (["ada"], ["--own-session", "grace"])]
    assert [one.returncode for one in done] == [0, 0], done[0].stderr + done[1].stderr
    failed = [shop.run("shop", *arguments) for arguments in (["bad-ada"], ["--own-session", "bad-grace"])]
    assert [one.returncode for one in failed] == [1, 1]
    shop.start_worker()
    welcomed = "SELECT name FROM shop_welcomes WHERE saw_user AND users > 0"
    eventually(lambda: len(shop.database.column(welcomed)) >= 2, "both are welcomed")
    assert sorted(shop.database.column("SELECT name FROM shop_welcomes")) == ["ada", "grace"]


def test_the_readme_names_each() -> None:
    folders = {path.name for path in EXAMPLES.iterdir() if path.is_dir()}
    named = (EXAMPLES / "README.md").read_text()
    assert folders == {"flask_app", "fastapi_app", "two_databases"}
    assert all(f"`{name}`" in named for name in folders)
