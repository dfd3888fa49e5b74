"""What is missing is named with a command, or a URL, that works where it is typed."""

import json
import sys
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest

from celery_alchemy.strategies.drivers.url import parse_url
from celery_alchemy.strategies.errors import InvalidSetting
from celery_alchemy.workers.commands import installing

MODULES = {"psycopg": "psycopg", "psycopg2": "psycopg2", "pymysql": "pymysql", "mysqldb": "MySQLdb"}
HERE = "(this driver is installed); the rest stays as it is."


@pytest.mark.parametrize(
    ("origin", "what"),
    [
        (None, "celery-alchemy[gevent]"),
        ({"url": "file:///home/me/my%20code/celery", "dir_info": {}}, "/home/me/my code/celery[gevent]"),
        ({"url": "file:///tmp/celery_alchemy-1.whl", "archive_info": {}}, "/tmp/celery_alchemy-1.whl[gevent]"),
        ({"url": "https://example.org/celery-alchemy", "vcs_info": {}}, "celery-alchemy[gevent]"),
    ],
)
def test_an_extra_is_installed_from_where_the_package_came(
    monkeypatch: pytest.MonkeyPatch, origin: dict[str, Any] | None, what: str
) -> None:
    class Distribution:
        def read_text(self, name: str) -> str | None:
            return json.dumps(origin) if origin and name == "direct_url.json" else None

    monkeypatch.setattr(installing, "distribution", lambda name: Distribution())
    assert installing.install("gevent") == f"pip install '{what}'"


def test_a_package_without_metadata_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def distribution(name: str) -> Any:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(installing, "distribution", distribution)
    assert installing.install("gevent") == "pip install 'celery-alchemy[gevent]'"


@pytest.mark.parametrize(
    ("url", "installed", "said"),
    [
        ("postgres://u:secret@h/d", ["psycopg", "psycopg2"], f"Begin the URL with postgresql+psycopg:// {HERE}"),
        ("postgres://u:secret@h/d", ["psycopg2"], f"Begin the URL with postgresql+psycopg2:// {HERE}"),
        ("postgres+psycopg2://h/d", ["psycopg", "psycopg2"], f"Begin the URL with postgresql+psycopg2:// {HERE}"),
        ("postgres://h/d", [], "postgresql+psycopg://, and install this driver: pip install 'psycopg[binary]'."),
        ("postgresql+psycopg2://h/d", ["psycopg"], f"postgresql+psycopg:// {HERE} Or pip install psycopg2-binary."),
        ("postgresql+psycopg2://h/d", [], "Remedy: pip install psycopg2-binary."),
        ("postgresql+psycopg3://h/d", ["psycopg"], "no driver 'psycopg3' for postgresql. Begin the URL with "),
        ("mysql://h/d", ["pymysql"], f"Begin the URL with mysql+pymysql:// {HERE} Or pip install mysqlclient."),
        ("mysql://h/d", [], "Begin the URL with mysql+pymysql://, and install this driver: pip install PyMySQL."),
        ("mysql+mysqlclient://h/d", ["mysqldb"], f"Begin the URL with mysql+mysqldb:// {HERE}"),
        ("mariadb://h/d", ["pymysql"], f"Begin the URL with mariadb+pymysql:// {HERE}"),
        ("sqlite3:///shop.db", [], f"Begin the URL with sqlite:// {HERE}"),
        ("oracle://h/d", [], "Remedy: install the package that provides it (oracledb)."),
        ("redis://h/0", ["psycopg"], "knows no dialect 'redis'. Known to work here: postgresql+psycopg"),
    ],
)
def test_a_url_is_told_what_to_begin_with(
    monkeypatch: pytest.MonkeyPatch, url: str, installed: list[str], said: str
) -> None:
    for driver, module in MODULES.items():
        if driver not in installed:
            monkeypatch.setitem(sys.modules, module, None)
        elif find_spec(module) is None:  # mysqlclient, where it could not be built
            monkeypatch.setitem(sys.modules, module, ModuleType(module))
    monkeypatch.setitem(sys.modules, "oracledb", None)
    with pytest.raises(InvalidSetting) as caught:
        parse_url(url, "alchemy_database_url")
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)
