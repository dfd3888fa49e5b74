"""What `celery report` and `celery inspect conf` show of the settings, and what our messages do: no password, however
it is written, wherever it stands."""

import copy
import dataclasses
import functools
import json
import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.app.utils import filter_hidden_settings
from celery.utils.serialization import jsonify
from kombu.utils.encoding import safe_repr
from sqlalchemy import URL
from support import preloaded
from support.databases import PostgreSQL
from support.worker import Site, Worker, running

from celery_alchemy import Alchemy, ConfigurationError, WorkerPool
from celery_alchemy.strategies.drivers.url import parse_url, shown, shown_text
from celery_alchemy.strategies.errors import InvalidSetting

#: Each made of words that stand nowhere else.
PASSWORDS = [
    "sesame/barley",
    "sesame@barley",
    "sesame/barley@oats",
    "sesame:barley",
    "sesame?barley",
    "sesame#barley",
    "sesame barley",
    "sesame%2Fbarley",
    "sesame%barley",
    "sésame-bärley",
    "sesame=barley",
    "sesame;barley",
    "sesame&barley",
    "sesame'barley\"oats",
    "sesame\\barley",
    "sesame[barley]",
    "sesame@barley/oats?millet=sorghum",
]
HALVES = ("sesame", "barley", "oats", "millet", "sorghum", "sésame", "bärley")


def written(password: str) -> dict[str, Any]:
    """Return the ways in which people write a database with this password."""
    return {
        "url": f"postgresql+psycopg://shop:{password}@localhost/shop",
        "no user": f"postgresql+psycopg://:{password}@localhost/shop",
        "no host": f"postgresql+psycopg://shop:{password}@/shop",
        "user alone": f"postgresql+psycopg://{password}@localhost/shop",
        "ipv6": f"postgresql+psycopg://shop:{password}@[::1]:5432/shop",
        "hosts": f"postgresql+psycopg://shop:{password}@one:1,two:2/shop",
        "in the query": f"postgresql+psycopg://localhost/shop?user=shop&password={password}",
        "sslpassword": f"postgresql+psycopg://shop@localhost/shop?sslpassword={password}",
        "after an ampersand": f"postgresql+psycopg://localhost/shop&password={password}",
        "mssql": f"mssql+pyodbc://localhost/shop;PWD={password}",
        "odbc": f"mssql+pyodbc:///?odbc_connect=DRIVER=x;PWD={password}",
        "jdbc": f"jdbc:postgresql://localhost/shop?user=shop&password={password}",
        "dsn": f"host=localhost dbname=shop password='{password}'",
        "libpq": f"postgres://shop:{password}@localhost/shop",
        "sqlcipher": f"sqlite+pysqlcipher://:{password}@/shop.db?cipher=aes-256-cfb",
        "object": URL.create("postgresql+psycopg", "shop", password, "localhost", 5432, "shop"),
        "bare": password,
    }


class Thing:
    def __init__(self, password: str) -> None:
        self.password = password

    def __repr__(self) -> str:
        return f"Thing({self.password!r})"


@dataclasses.dataclass
class Record:
    password: str


def settings(password: str) -> dict[str, Any]:
    """Return settings that hold it everywhere at once; not all of it works, and it is reported all the same."""
    texts = written(password)
    things = [Thing(password), Record(password), functools.partial(print, password), lambda p=password: p, {password}]
    values = {**texts, "things": things, "bytes": password.encode(), "deep": [({"a": [*texts.values()]},)]}
    return {
        "alchemy_database_url": texts["url"],
        "alchemy_replica_database_url": texts["object"],
        "alchemy_databases": {
            **texts,
            "dict": {"url": texts["url"], "replica_url": texts["object"], "engine_options": {"connect_args": values}},
            "thing": Thing(password),
            "list": [texts["url"]],
            texts["url"]: texts["url"],
            "misspelled": {"urls": texts["url"], texts["url"]: 1, "session_strategy": texts["url"]},
        },
        "alchemy_engine_options": {"connect_args": {**values, "dsn": texts["dsn"]}, "creator": things[2], **values},
        "alchemy_session_options": {"binds": values, "info": values},
        "alchemy_session_strategy": {"prefork": texts["url"]},
        "alchemy_external_pooler": texts["url"],
        "alchemy_metrics": texts["url"],
        "alchemy_url": texts["url"],
        "alchemy_dsns": values,
    }


def reports(app: Celery) -> str:
    """Return what Celery shows of the configuration, by all its ways."""
    answers = [
        jsonify(app.conf.table(with_defaults=defaults), unknown_type_filter=safe_repr) for defaults in (False, True)
    ]  # as `celery inspect conf` answers
    return "\n".join(
        [app.bugreport(), app.conf.humanize(with_defaults=True), repr(app.conf.table()), *map(str, answers)]
    )


def halves(text: str) -> list[str]:
    """Return the lines that show a part of a password."""
    return [line for line in text.splitlines() if any(half in line for half in HALVES)]


CONFIGURED = {
    "before": lambda app, values: (app.conf.update(values), Alchemy(app)),
    "after": lambda app, values: (Alchemy(app), app.conf.update(values)),
    "one by one": lambda app, values: (Alchemy(app), [app.conf.__setitem__(*item) for item in values.items()]),
    "object": lambda app, values: (Alchemy(app), app.config_from_object(type("Config", (), values))),
    "object before": lambda app, values: (app.config_from_object(type("Config", (), values)), Alchemy(app)),
    "read before": lambda app, values: (app.conf.update(values), app.conf.timezone, Alchemy(app)),
    "read, then changed": lambda app, values: (Alchemy(app), app.conf.timezone, app.conf.update(values)),
    "configured anew": lambda app, values: (
        Alchemy(app),
        app.conf.timezone,
        app.config_from_object(type("Config", (), values)),
    ),
    "namespace": lambda app, values: (
        Alchemy(app),
        app.config_from_object(
            type("Config", (), {f"CELERY_{name.upper()}": value for name, value in values.items()}), namespace="CELERY"
        ),
    ),
    "without the namespace": lambda app, values: (
        Alchemy(app),
        app.config_from_object(type("Config", (), {name.upper(): value for name, value in values.items()})),
    ),
    "defaults": lambda app, values: (Alchemy(app), app.add_defaults(lambda: values)),
    "init_app": lambda app, values: (app.conf.update(values), Alchemy().init_app(app)),
}


@pytest.mark.parametrize("configured", CONFIGURED)
def test_no_report_shows_a_password(configured: str) -> None:
    for password in PASSWORDS:
        app = Celery("shop", broker="memory://", set_as_current=False)
        CONFIGURED[configured](app, settings(password))
        shown = reports(app)
        assert halves(shown) == [], password
        assert "alchemy_databases" in shown.lower()
        assert halves(str(app.conf.copy().table())) == []


def test_a_dict_that_is_changed_later_is_masked_too() -> None:
    """It is the report that is masked, not the configuration."""
    databases: dict[str, Any] = {}
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.alchemy_databases = databases
    Alchemy(app)
    databases["reports"] = url = "postgresql+psycopg://shop:sesame/barley@localhost/reports"
    assert app.conf.alchemy_databases is databases
    assert halves(reports(app)) == []
    assert app.conf.alchemy_databases["reports"] == url
    assert app.conf.table(censored=False)["alchemy_databases"]["reports"] == url
    assert pickle.loads(pickle.dumps(app.conf.changes))["alchemy_databases"]["reports"] == url
    assert copy.copy(app.conf).alchemy_databases["reports"] == url


def test_what_is_no_secret_is_shown() -> None:
    app = Celery("shop", broker="memory://", set_as_current=False)
    Alchemy(app)
    app.conf.update(
        alchemy_databases={
            "reports": "postgresql+psycopg://shop:sesame/barley@db.internal:6432/reports?sslmode=require",
            "archive": {"url": "mysql+pymysql://shop:sesame@[::1]/archive", "engine_options": {"pool_size": 3}},
        },
        alchemy_engine_options={"pool_size": 7, "isolation_level": "SERIALIZABLE", "echo": True, "pool_timeout": 2.5},
        alchemy_session_strategy={"prefork": "local"},
        alchemy_metrics="shop.metrics:observer",
        alchemy_warn_idle_s=5,
    )
    assert app.conf.table()["alchemy_databases"] == {
        "reports": "postgresql+psycopg://db.internal:6432/reports",
        "archive": {"url": "mysql+pymysql://::1/archive", "engine_options": {"pool_size": 3}},
    }
    shown = reports(app)
    for part in ("'pool_size': 7", "SERIALIZABLE", "2.5", "'local'", "shop.metrics:observer", "alchemy_warn_idle_s: 5"):
        assert part in shown


def test_no_place_of_celerys_is_replaced() -> None:
    """Another app of the same process has Celery's own reports, and Celery's functions are Celery's."""
    Alchemy(Celery("shop", broker="memory://", set_as_current=False))
    other = Celery("other", broker="memory://", set_as_current=False)
    other.conf.some_dict = {"word": "as it is"}
    assert type(other.conf).table.__module__ == filter_hidden_settings.__module__ == "celery.app.utils"
    assert other.conf.table()["some_dict"] == {"word": "as it is"}


# -- our own messages ------------------------------------------------------------------------------------------------


def refusals(password: str) -> list[dict[str, Any]]:
    """Return settings, most of which are refused."""
    texts = written(password)
    found: list[dict[str, Any]] = []
    for text in texts.values():
        found += [
            {"alchemy_database_url": text},
            {"alchemy_replica_database_url": text},
            {"alchemy_databases": {"reports": text}},
            {"alchemy_databases": {"reports": {"url": text}}},
        ]
    for text in (texts["url"], texts["dsn"], texts["jdbc"], texts["in the query"]):
        found += [
            {"alchemy_databases": text},
            {"alchemy_databases": [text]},
            {"alchemy_databases": {text: text}},
            {"alchemy_databases": {"reports": {text: text}}},
            {"alchemy_databases": {"reports": {"url": [text]}}},
            {"alchemy_engine_options": {text: text}},
            {"alchemy_engine_options": {"pool_size": text}},
            {"alchemy_engine_options": {"poolclass": text}},
            {"alchemy_engine_options": {"connect_args": text}},
            {"alchemy_engine_options": {"creator": text}},
            {"alchemy_session_options": {text: text}},
            {"alchemy_session_options": text},
            {"alchemy_session_strategy": text},
            {"alchemy_session_strategy": {text: "local"}},
            {"alchemy_session_strategy": {"threads": text}},
            {"alchemy_external_pooler": text},
            {"alchemy_metrics": text},
            {"alchemy_commit_on_success": text},
            {"alchemy_isolation_retries": text},
            {"alchemy_begin_with_first_statement": text},
            {"alchemy_warn_idle_s": text},
        ]
    return found


@pytest.mark.parametrize("password", ["sesame/barley", "sesame@barley/oats?millet=sorghum", "sesame%barley"])
def test_no_message_shows_a_password(password: str, caplog: pytest.LogCaptureFixture) -> None:
    refused = 0
    for values in refusals(password):
        app = Celery("shop", broker="memory://", set_as_current=False)
        app.conf.update({"alchemy_database_url": "postgresql+psycopg://localhost/shop", **values})
        db = Alchemy(app)
        shown = [repr(db)]
        try:
            for one in (db, *db.databases.values()):
                shown += [one.start_worker(WorkerPool(name="threads", concurrency=2)).describe(), repr(one)]
                shown += [repr(one.settings), repr(one.strategy)]
        except ConfigurationError as error:
            refused += 1
            shown += [str(error), repr(error)]
        db.stop()
        assert halves("\n".join(shown)) == [], str(values)
    assert refused > 60
    assert halves(caplog.text) == []


def test_no_message_about_a_url_shows_a_password() -> None:
    for password in PASSWORDS:
        for url in written(password).values():
            try:
                said = shown(parse_url(url, "alchemy_database_url"))
            except InvalidSetting as error:
                said = str(error)
            assert halves(f"{said} {shown_text(url)}") == [], url


@pytest.mark.parametrize("password", ["p@ss:word", "p@ss/word", "p@ss?word", "p@ss", "p/a@ss"])
def test_a_password_that_is_cut_in_two_is_refused(password: str) -> None:
    """SQLAlchemy takes its second half for the host, and the driver would show that in its error."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.alchemy_database_url = f"postgresql+psycopg://shop:{password}@localhost/shop"
    with pytest.raises(ConfigurationError, match=r"alchemy_database_url .*ercent-encode"):
        Alchemy(app).start_worker(WorkerPool(name="threads", concurrency=2))


@pytest.mark.parametrize(
    "text",
    [
        "postgresql+psycopg://me@corp:sesame@localhost/shop",
        "postgresql+psycopg://shop:sesame/barley@localhost/shop",
        "postgresql+psycopg://localhost/shop?user=me@corp",
        "postgresql+psycopg://shop:sesame@localhost/shop?user=me@corp",
        "object",
        "sqlite:////tmp/me@work/shop.db",
        "sqlite://",
    ],
)
def test_an_at_sign_where_it_belongs_is_let_be(text: str) -> None:
    app = Celery("shop", broker="memory://", set_as_current=False)
    made = URL.create("postgresql+psycopg", "shop", "p@ss", "localhost", database="a@b")
    app.conf.alchemy_database_url = made if text == "object" else text
    db = Alchemy(app)
    db.start_worker(WorkerPool(name="threads", concurrency=2))
    db.stop()


# -- real commands, and a real worker --------------------------------------------------------------------------------

SHOP = """
from celery import Celery
from celery_alchemy import Alchemy
app = Celery("shop", broker="memory://")
db = Alchemy(app)
app.config_from_object("settings")
"""


@pytest.mark.parametrize("command", ["report", "alchemy doctor --json", "alchemy doctor"])
def test_a_command_shows_no_password(tmp_path: Path, command: str) -> None:
    url = "postgresql+psycopg://shop:sesame/barley@127.0.0.1:1/shop"
    (tmp_path / "shop.py").write_text(SHOP)
    (tmp_path / "settings.py").write_text(
        f"alchemy_database_url = {url!r}\nalchemy_databases = {{'reports': {url!r}, 'more': {{'url': {url!r}}}}}\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command_line = [sys.executable, "-m", "celery", "-A", "shop", *command.split()]
    done = preloaded.run(command_line, cwd=tmp_path, env=environment, timeout=250)
    assert "127.0.0.1:1/shop" in done.stdout, done.stderr
    assert halves(done.stdout + done.stderr) == []


def test_a_worker_shows_no_password(site: Site, run_database: PostgreSQL, key: str) -> None:
    name = f"secrecy-{key[:8]}"
    url = run_database.url(name)
    reports = re.sub(r"//[^@]*@", "//postgres:sesame/barley@", url)
    worker = Worker(
        site, name, "solo", database_url=url, settings={"alchemy_databases": {"reports": reports}},
        arguments=["-l", "debug"], modules=("endings",),
    )  # fmt: skip
    with running(worker):
        answers = [worker.inspect("conf"), worker.inspect("conf", with_defaults=True), worker.inspect("report")]
        assert "reports" in json.dumps(answers[0])
        assert halves(json.dumps(answers) + worker.log()) == []
