"""alchemy_databases: what it may say, and what is said of what it may not; no worker is needed."""

from pathlib import Path
from typing import Annotated, Any

import pytest
from celery import Celery
from pydantic import BaseModel
from sqlalchemy import MetaData, create_engine, text
from sqlalchemy.orm import Session
from support.apps import Isolated

from celery_alchemy import Alchemy, ConfigurationError, CurrentSession, DatabaseTask, UseDatabase, outbox_table
from celery_alchemy.workers.databases import check_two_phase
from celery_alchemy.workers.sending.recording import recording
from celery_alchemy.workers.starting.checks import refuse_unknown_databases


def make(tmp_path: Path, **conf: Any) -> tuple[Celery, Alchemy]:
    app = Isolated("several", broker="memory://", set_as_current=False)
    app.conf.update({"alchemy_database_url": f"sqlite:///{tmp_path}/default"} | conf)
    return app, Alchemy(app)


BAD: list[tuple[Any, str]] = [
    ("sqlite://", "alchemy_databases is a str, but it must be a dict from a database's name to its URL"),
    ({1: "sqlite://"}, "alchemy_databases has the key 1, but its keys must be strings"),
    ({"reports": 7}, r"alchemy_databases\['reports'\] is an int, but it must be a URL, or a dict with 'url'"),
    ({"reports": {"ulr": "x"}}, r"\['reports'\] has the key 'ulr', which is none of a database. Did you mean 'url'\?"),
    ({"reports": {"pool_size": 3}}, "keyword arguments of create_engine go into 'engine_options'"),
    ({"reports": {"url": 7}}, r"\['reports'\]\['url'\] is an int, but it must be a URL"),
    ({"reports": {"engine_options": {"pool_size": "3"}}}, r"\['engine_options'\]\['pool_size'\] is '3', but it must"),
    ({"reports": {"url": "sqlite://", "engine_options": {"poolsize": 3}}}, "poolsize"),
    ({"reports": {}}, "No URL for the database 'reports': put it into app.conf.alchemy_databases"),
    ({"reports": "postgresql+asyncpg://x/y"}, r"alchemy_databases\['reports'\]\['url'\]=.* names the async driver"),
    ({"reports": "postgres!!secret"}, r"alchemy_databases\['reports'\]\['url'\] is not a URL"),
    ({"default": "sqlite://"}, r"alchemy_databases\['default'\] says 'url', and so does alchemy_database_url"),
    ({"reports": {"url": "sqlite://", "session_strategy": "scopd"}}, "Did you mean 'scoped'"),
]


@pytest.mark.parametrize(("databases", "message"), BAD)
def test_what_cannot_work_is_refused_by_its_name(tmp_path: Path, databases: Any, message: str) -> None:
    _, db = make(tmp_path, alchemy_databases=databases)
    with pytest.raises(ConfigurationError, match=message) as raised:
        for one in db.databases.values():
            one.strategy  # noqa: B018
    assert "secret" not in str(raised.value)


def test_the_default_database_may_stand_among_the_others(tmp_path: Path) -> None:
    app = Isolated("several", broker="memory://", set_as_current=False)
    default = {"url": f"sqlite:///{tmp_path}/a", "session_options": {"autoflush": False}}
    app.conf.alchemy_databases = {"default": default, "reports": f"sqlite:///{tmp_path}/b"}
    db = Alchemy(app)
    with db.unit_of_work() as session:
        assert session.get_bind().url.database == f"{tmp_path}/a"
        assert db.databases["reports"].session.get_bind().url.database == f"{tmp_path}/b"
        assert session.autoflush is db.databases["reports"].session().autoflush is False, "the app's, not one server's"


def test_engine_options_are_of_one_database_and_the_strategy_of_all(tmp_path: Path) -> None:
    _, db = make(
        tmp_path,
        alchemy_engine_options={"echo": False, "pool_size": 7},
        alchemy_session_strategy="scoped",
        alchemy_databases={"reports": f"sqlite:///{tmp_path}/b"},
    )
    assert db.engine.pool.size() == 7
    assert db.databases["reports"].engine.pool.size() != 7
    assert db.databases["reports"].strategy.name == "scoped"


def test_an_unknown_database_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    app, db = make(tmp_path, alchemy_databases={"reports": "sqlite://"})
    with pytest.raises(ConfigurationError, match=r"'report' is not a database of this app. Did you mean 'reports'"):
        db.databases["report"]

    @app.task(base=DatabaseTask)
    def task(there: Annotated[Session, UseDatabase("reprots")]) -> None: ...

    with pytest.raises(ConfigurationError, match=r"The parameter 'there' of the task .*task: 'reprots' is not a datab"):
        refuse_unknown_databases(app, db.databases)


def test_an_alchemy_of_its_own_brings_its_engine(tmp_path: Path) -> None:
    app, db = make(tmp_path)
    engine = create_engine(f"sqlite:///{tmp_path}/own")
    reports = Alchemy(app, engine=engine, database="reports")
    assert list(db.databases) == ["default", "reports"]
    assert db.databases["reports"] is reports
    assert reports.engine is engine
    with db.unit_of_work():
        assert reports.session.get_bind() is engine
    with pytest.raises(ConfigurationError, match="has an Alchemy for the database 'reports' already"):
        Alchemy(app, database="reports")
    with pytest.raises(ConfigurationError, match="Alchemy\\(database=''\\)"):
        Alchemy(app, database="")


def test_without_a_default_database_the_message_names_what_there_is(tmp_path: Path) -> None:
    app = Isolated("several", broker="memory://", set_as_current=False)
    Alchemy(app, database="reports", engine=create_engine("sqlite://"))

    @app.task(base=DatabaseTask, bind=True)
    def task(self: DatabaseTask) -> None:
        self.db.execute(text("SELECT 1"))

    with pytest.raises(ConfigurationError, match="has an Alchemy for 'reports', but none for its default database"):
        task.apply().get()


def test_sessions_are_passed_by_their_database_and_hidden_from_callers(tmp_path: Path) -> None:
    app, db = make(tmp_path, alchemy_databases={"reports": f"sqlite:///{tmp_path}/b"})
    Reports = Annotated[Session, UseDatabase("reports")]

    class Order(BaseModel):
        number: int

    @app.task(base=DatabaseTask, bind=True, pydantic=True)
    def task(self: DatabaseTask, order: Order, here: CurrentSession, there: Reports, more: int = 2) -> list[Any]:
        return [order.number, here is self.db, there is db.databases["reports"].session(), more]

    assert task.apply((Order(number=7),)).get() == [7, True, True, 2]
    assert task.apply(({"number": 7}, 5)).get() == [7, True, True, 5]
    with pytest.raises(TypeError):
        task.delay({"number": 7}, 5, 6)
    with Session() as mine, db.unit_of_work():
        assert task({"number": 7}, there=mine) == [7, True, False, 2]


def test_the_report_hides_every_password(tmp_path: Path) -> None:
    app, _ = make(
        tmp_path,
        alchemy_databases={
            "first": "postgresql+psycopg://u:secret1@h/x",
            "second": {
                "url": "postgresql+psycopg://u:secret2@h/x",
                "engine_options": {"connect_args": {"dsn": "secret3"}},
            },
        },
    )
    report = app.bugreport()
    assert "secret" not in report
    assert "first" in report


def test_two_phases_need_two_phases(tmp_path: Path) -> None:
    _, db = make(tmp_path, alchemy_two_phase=True, alchemy_databases={"reports": f"sqlite:///{tmp_path}/b"})
    with pytest.raises(ConfigurationError, match="'default' and 'reports' cannot prepare a transaction"):
        check_two_phase(db.databases)


@pytest.mark.parametrize("outbox", [False, True])
def test_messages_wait_for_the_innermost_unit_of_work(tmp_path: Path, outbox: bool) -> None:
    app, db = make(tmp_path, alchemy_databases={"reports": f"sqlite:///{tmp_path}/b"}, alchemy_outbox=outbox)
    reports = db.databases["reports"]
    outbox_table(metadata := MetaData())
    metadata.create_all(db.engine)

    @app.task(base=DatabaseTask, name="shop.send")
    def send(what: str) -> None: ...

    def sent() -> list[str]:
        return [message.args[0] for message in enqueued]

    with recording(app) as enqueued:
        with reports.unit_of_work():
            send.delay_on_commit("in a block of reports")
            assert sent() == []
        with pytest.raises(ZeroDivisionError), reports.unit_of_work():
            send.delay_on_commit("dropped")
            raise ZeroDivisionError
        assert sent() == ["in a block of reports"]
        with db.unit_of_work() as session:
            send.delay_on_commit("in a block of both")
            with reports.unit_of_work() as alone:
                send.delay_on_commit("inside")
                send.apply_async_on_commit(("for the Session",), session=alone)
            assert sent()[1:] == ["inside", "for the Session"]
            send.apply_async_on_commit(("for the part",), session=reports.session)
            reports.session.execute(text("SELECT 1"))
            session.execute(text("SELECT 1"))
            assert len(sent()) == 3
        assert sorted(sent()[3:]) == ["for the part", "in a block of both"]


def test_a_session_class_of_ones_own_is_for_all(tmp_path: Path) -> None:
    class Mine(Session):
        pass

    app = Isolated("mine", broker="memory://", set_as_current=False)
    app.conf.alchemy_databases = {"default": f"sqlite:///{tmp_path}/a", "reports": f"sqlite:///{tmp_path}/b"}
    db = Alchemy(app, session_factory=Mine)
    with db.unit_of_work() as session:
        assert isinstance(session, Mine)
        assert isinstance(db.databases["reports"].session(), Mine)
