"""Settings that cannot be meant are refused, wherever an Engine is first asked for."""

from typing import Any

import pytest
from celery import Celery
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker
from support.apps import Isolated

from celery_alchemy import Alchemy, ConfigurationError


@pytest.fixture
def app() -> Celery:
    app = Isolated("outside", broker="memory://", set_as_current=False)
    app.conf.alchemy_database_url = "sqlite://"
    return app


@pytest.mark.parametrize("brings", ["engine", "session_factory"])
@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        (
            "alchemy_database_url",
            "postgresql+psycopg://me:s3cret@localhost/shop",
            "postgresql+psycopg://localhost/shop",
        ),
        ("alchemy_replica_database_url", "postgresql+psycopg://:s3c@ret@localhost/shop", "********"),
        ("alchemy_engine_options", {"pool_size": 3, "echo": "s3cret"}, "'pool_size', 'echo'"),
    ],
)
def test_what_says_how_an_engine_is_made_is_refused_beside_one(
    brings: str, setting: str, value: Any, says: str
) -> None:
    engine = create_engine("sqlite://")
    given = {"engine": engine} if brings == "engine" else {"session_factory": sessionmaker(engine)}
    app = Isolated("outside", broker="memory://", set_as_current=False)
    app.conf[setting] = value
    db = Alchemy(app, **given)
    if (brings, setting) == ("session_factory", "alchemy_database_url"):
        assert str(db.engine.url) != "sqlite://", "the URL wins over the bind of a sessionmaker"
        return
    with pytest.raises(ConfigurationError, match=r"has no effect: .* brings an Engine, of 'sqlite:///'") as refused:
        _ = db.engine
    assert f"{setting} ({says})" in str(refused.value)
    assert "s3c" not in str(refused.value)


def test_an_engine_of_another_database_has_no_settings_beside_it() -> None:
    app = Isolated("outside", broker="memory://", set_as_current=False)
    app.conf.update(
        alchemy_database_url="sqlite://",
        alchemy_engine_options={"echo": False},
        alchemy_databases={"reports": {"engine_options": {"echo": True}}},
    )
    db = Alchemy(app)
    reports = Alchemy(app, database="reports", engine=create_engine("sqlite://"))
    assert db.engine is not None
    with pytest.raises(
        ConfigurationError, match=r"alchemy_databases\['reports'\]\['engine_options'\] \('echo'\) has no"
    ):
        _ = reports.engine


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("alchemy_pool_size", "Write alchemy_engine_options = {'pool_size': ...}."),
        ("alchemy_poolsize", "Write alchemy_engine_options = {'pool_size': ...}."),
        ("alchemy_echo", "Write alchemy_engine_options = {'echo': ...}."),
        ("alchemy_expire_on_commit", "Write alchemy_session_options = {'expire_on_commit': ...}."),
        ("alchemy_engine_option", "Did you mean 'alchemy_engine_options'?"),
    ],
)
def test_an_option_of_sqlalchemys_is_told_where_it_belongs(app: Celery, setting: str, hint: str) -> None:
    app.conf[setting] = 3
    with pytest.raises(ConfigurationError) as refused:
        _ = Alchemy(app).engine
    assert hint in str(refused.value)


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), 1e12])
def test_rows_of_completed_tasks_are_kept_for_a_while(app: Celery, value: float) -> None:
    app.conf.alchemy_completed_kept_s = value
    with pytest.raises(ConfigurationError, match=r"alchemy_completed_kept_s is .*a number of seconds above 0"):
        _ = Alchemy(app).engine


@pytest.mark.parametrize(("value", "name"), [(3, "an int"), ("x", "a str"), ([], "a list"), (object(), "an object")])
def test_messages_have_the_right_article(app: Celery, value: Any, name: str) -> None:
    app.conf.alchemy_engine_options = value
    with pytest.raises(ConfigurationError, match=f"alchemy_engine_options is {name}, but"):
        _ = Alchemy(app).engine
