"""Configuration that cannot work stops a real worker at start; what is right works in every style Celery knows."""

import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from celery import Celery
from support.databases import PostgreSQL
from support.waiting import eventually
from support.worker import Site, start_process, stop_process

SECRET = "s3cr3t-pa55"
GOOD_URL = f"postgresql+psycopg://shop:{SECRET}@127.0.0.1:1/shop"  # nobody listens there; nobody should ask
START = """
import os
import sqlalchemy
from celery import Celery
from celery_alchemy import Alchemy, DatabaseTask

app = Celery("shop", broker=os.environ["BROKER"])
app.conf.task_default_queue = os.environ["QUEUE"]
app.conf.broker_transport_options = {{"global_keyprefix": os.environ["KEY_PREFIX"]}}
{configure}
{initialise}

@app.task(base=DatabaseTask, bind=True)
def create(self, name):
    self.db.execute(sqlalchemy.text("INSERT INTO users (name) VALUES (:name)"), {{"name": name}})
    self.db.commit()
"""


class Bad(NamedTuple):
    """A configuration that cannot work, and what the message must say: the value, its place, the remedy."""

    configure: str
    says: tuple[str, ...]
    initialise: str = "db = Alchemy(app)"
    arguments: tuple[str, ...] = ()


def flat(**settings: object) -> str:
    return f"app.conf.update({ ({'alchemy_database_url': GOOD_URL} | settings)!r})"


BAD = {
    "unknown-strategy": Bad(
        flat(alchemy_session_strategy="scopd"),
        ("alchemy_session_strategy", "'scopd'", "'scoped'", "local", "per_process"),
    ),
    "unknown-strategy-in-a-dict": Bad(
        flat(alchemy_session_strategy={"solo": "lokal"}),
        ("alchemy_session_strategy", "solo", "'lokal'", "'local'"),
    ),
    "unknown-worker-pool-in-a-dict": Bad(
        flat(alchemy_session_strategy={"thread": "local"}),
        ("alchemy_session_strategy", "'thread'", "'threads'"),
    ),
    "unknown-strategy-on-the-command-line": Bad(
        flat(), ("--session-strategy", "'locale'", "'local'"), arguments=("--session-strategy", "locale")
    ),
    "class-that-is-not-there": Bad(
        flat(alchemy_session_strategy="shop:Missing"), ("alchemy_session_strategy", "shop:Missing")
    ),
    "class-that-is-no-strategy": Bad(
        flat(alchemy_session_strategy="celery:Celery"), ("alchemy_session_strategy", "celery:Celery", "SessionStrategy")
    ),
    "strategy-that-refuses-the-worker-pool": Bad(
        flat(alchemy_session_strategy="support.project.strategies:SoloOnlyStrategy"),
        ("solo_only", "threads", "it was written for solo"),
        arguments=("--pool", "threads"),
    ),
    "unknown-key": Bad(
        flat(alchemy_engine_option={"pool_size": 3}), ("alchemy_engine_option", "alchemy_engine_options")
    ),
    "options-beside-an-engine": Bad(
        flat(),
        ("alchemy_database_url", "postgresql+psycopg://127.0.0.1:1/shop", "Alchemy(engine=...)", "Leave it out"),
        initialise="db = Alchemy(app, engine=sqlalchemy.create_engine('sqlite://'))",
    ),
    "wrong-type": Bad(flat(alchemy_commit_on_success="no"), ("alchemy_commit_on_success", "'no'", "True", "False")),
    "options-of-the-wrong-type": Bad(flat(alchemy_engine_options="pool_size=3"), ("alchemy_engine_options", "dict")),
    "engine-option-that-sqlalchemy-does-not-know": Bad(
        flat(alchemy_engine_options={"pool_sise": 3}), ("alchemy_engine_options", "pool_sise")
    ),
    "session-option-that-sqlalchemy-does-not-know": Bad(
        flat(alchemy_session_options={"autoflsh": False}), ("alchemy_session_options", "autoflsh")
    ),
    "no-url": Bad("", ("alchemy_database_url", "postgresql")),
    "empty-url": Bad(flat(alchemy_database_url=""), ("alchemy_database_url",)),
    "unparsable-url": Bad(
        flat(alchemy_database_url=f"postgresql:/shop:{SECRET}@localhost"), ("alchemy_database_url", "postgresql")
    ),
    "unknown-dialect": Bad(
        flat(alchemy_database_url=GOOD_URL.replace("postgresql+psycopg", "postgrsql")),
        ("alchemy_database_url", "postgrsql"),
    ),
    "missing-driver": Bad(
        flat(alchemy_database_url=GOOD_URL.replace("psycopg", "pg8000")),
        ("alchemy_database_url", "pg8000", "nstall"),
    ),
    "async-driver": Bad(
        flat(alchemy_database_url=GOOD_URL.replace("psycopg", "asyncpg")),
        ("alchemy_database_url", "asyncpg", "postgresql+psycopg://"),
    ),
    "session-without-a-base": Bad(
        flat(),
        ("shop.plain", "'session'", "base=DatabaseTask"),
        initialise="db = Alchemy(app)\nfrom celery_alchemy import CurrentSession\n"
        "@app.task\ndef plain(session: CurrentSession): pass",
    ),
    "misspelled-attribute": Bad(
        flat(),
        ("shop.reads", "readonly", "'read_only'"),
        initialise="db = Alchemy(app)\n@app.task(base=DatabaseTask, readonly=True)\ndef reads(): pass",
    ),
    "never-initialised": Bad(flat(), ("Alchemy(app)", "create"), initialise=""),
    "never-initialised-with-init-app": Bad(flat(), ("init_app",), initialise="db = Alchemy()"),
}


class Ended(NamedTuple):
    exit_code: int
    output: str
    queue_length: int


def run_worker(
    site: Site, folder: Path, files: dict[str, str], arguments: tuple[str, ...] = (), until: Callable[[], bool] = bool
) -> Ended:
    """Run a worker of the module `shop`, for which a message waits, until it ends by itself or `until` comes true."""
    for name, text in files.items():
        (folder / name).write_text(text)
    queue = f"{folder.name}-{uuid.uuid4().hex[:6]}"
    client = Celery("client", broker=site.urls.celery, set_as_current=False)
    client.conf.broker_transport_options = {"global_keyprefix": site.prefix}
    with client.connection_for_write() as connection:
        client.send_task("shop.create", (folder.name,), queue=queue, producer=client.amqp.Producer(connection))
    environment = {"BROKER": site.urls.celery, "QUEUE": queue, "KEY_PREFIX": site.prefix, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "celery", "-A", "shop", "worker", "-n", f"{queue}@here", "-l", "info"]
    command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    command += arguments if "--pool" in arguments else ["--pool", "solo", *arguments]
    log = folder / "log"
    process = start_process(command, log, environment, own=False)
    try:
        eventually(lambda: process.poll() is not None or until(), "the worker ended or did its work", within_s=40)
    finally:
        code = stop_process(process)
    return Ended(code, log.read_text(), site.redis.llen(f"{site.prefix}{queue}"))


@pytest.mark.parametrize("case", BAD)
def test_it_stops_the_worker_before_a_message_is_consumed(site: Site, tmp_path: Path, case: str) -> None:
    """With an exit code, and a message that names the value, its place and the remedy, and no password."""
    bad = BAD[case]
    module = START.format(configure=bad.configure, initialise=bad.initialise)
    ended = run_worker(site, tmp_path, {"shop.py": module}, bad.arguments)
    assert ended.exit_code not in (0, -9, -15), ended.output
    message = error_line(ended.output)
    for part in bad.says:
        assert part in message
    assert SECRET not in ended.output
    assert ended.queue_length == 1


def error_line(output: str) -> str:
    """Return the line in which the worker says why it stops: said once, and without a traceback."""
    lines = [line for line in output.splitlines() if "CRITICAL" in line or line.startswith("Error: ")]
    assert len(lines) == 1, output
    assert "Traceback" not in output
    return lines[0]


STYLES = {
    "module": ('app.config_from_object("settings")', "{lines}", "alchemy_"),
    "namespaced-module": ('app.config_from_object("settings", namespace="CELERY")', "{lines}", "CELERY_ALCHEMY_"),
    "namespaced-object": (
        'import settings; app.config_from_object(settings.Settings(), namespace="SHOP")',
        "class Settings:\n    {lines}",
        "SHOP_ALCHEMY_",
    ),
    "dict": ("import settings; app.config_from_object(vars(settings))", "{lines}", "alchemy_"),
    "updated": ("import settings; app.conf.update(vars(settings))", "{lines}", "alchemy_"),
    "namespaced-django-settings": (
        'app.config_from_object("settings:settings", namespace="CELERY")',
        # Like django.conf.settings: lazy, its attributes are not in its __dict__.
        "class Module:\n    {lines}\n"
        "class LazySettings:\n"
        "    def __getattr__(self, name): return getattr(Module, name)\n"
        "    def __dir__(self): return [name for name in dir(Module) if name.isupper()]\n"
        "settings = LazySettings()\n",
        "CELERY_ALCHEMY_",
    ),
}


def shop(style: str, settings: dict[str, object]) -> dict[str, str]:
    """Return the files of an app configured in this style; a name is spelled as the style wants it."""
    configure, template, prefix = STYLES[style]
    upper = prefix.isupper()
    spelled = {prefix + (name.upper() if upper else name): value for name, value in settings.items()}
    lines = "; ".join(f"{name} = {value!r}" for name, value in spelled.items())
    # The extension is made before the app is configured: it reads nothing until the worker starts.
    module = START.format(configure="", initialise=f"db = Alchemy(app)\n{configure}")
    return {"shop.py": module, "settings.py": template.format(lines=lines)}


@pytest.mark.parametrize("style", STYLES)
def test_right_settings_work_in_every_style(site: Site, tmp_path: Path, database: PostgreSQL, style: str) -> None:
    settings = {
        "database_url": database.url("configuration"),
        "engine_options": {"pool_size": 3},
        "session_options": {"autoflush": False},
        "session_strategy": "scoped",
        "commit_on_success": True,
    }
    created = "SELECT name FROM users WHERE name = :name"
    ended = run_worker(
        site,
        tmp_path,
        shop(style, settings),
        until=lambda: database.column(created, name=tmp_path.name) == [tmp_path.name],
    )
    assert database.column(created, name=tmp_path.name) == [tmp_path.name], ended.output
    assert ended.queue_length == 0
    assert "strategy scoped" in ended.output
    assert "QueuePool 3" in ended.output


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("engine_option", {}, "engine_options"), ("commit_on_success", "no", "True or False")],
    ids=["unknown-key", "wrong-type"],
)
def test_wrong_settings_are_named_as_the_style_spells_them(
    site: Site, tmp_path: Path, style: str, name: str, value: object, says: str
) -> None:
    prefix = STYLES[style][2]
    ended = run_worker(site, tmp_path, shop(style, {"database_url": GOOD_URL, name: value}))
    assert ended.exit_code not in (0, -9, -15), ended.output
    message = error_line(ended.output)
    if prefix.isupper():
        name = name.upper()
        says = says if " " in says else says.upper()
    assert prefix + name in message
    assert says in message
    assert SECRET not in ended.output
    assert ended.queue_length == 1


def test_a_setting_without_the_namespace_is_named(site: Site, tmp_path: Path) -> None:
    """ALCHEMY_DATABASE_URL where CELERY_ALCHEMY_DATABASE_URL is what Celery reads."""
    files = shop("namespaced-module", {}) | {"settings.py": f"ALCHEMY_DATABASE_URL = {GOOD_URL!r}"}
    ended = run_worker(site, tmp_path, files)
    assert ended.exit_code not in (0, -9, -15), ended.output
    assert "CELERY_ALCHEMY_DATABASE_URL" in error_line(ended.output)
    assert SECRET not in ended.output
    assert ended.queue_length == 1
