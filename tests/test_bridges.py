"""The code of flask.md, fastapi.md and injection.md on SQLite files: a failed task leaves no rows behind."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, current_app
from celery.signals import task_postrun, task_prerun
from flask import Flask
from flask import current_app as current_flask_app
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import text
from support.docs import DOCS, blocks, page_of, run_page
from support.project.models import Base

from celery_alchemy import Alchemy, WorkerPool

Page = Callable[[str], dict[str, Any]]


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    """Run one section; its app becomes the current one, as it would in a worker."""
    before, made = current_app._get_current_object(), []

    def run(title: str) -> dict[str, Any]:
        found = run_page(page_of(title), tmp_path, title=title)
        made.append(found)
        found["app"].set_current()
        found["app"].conf.update(task_always_eager=True, task_eager_propagates=True)
        return found

    yield run
    before.set_current()
    for found in made:
        found["app"]._celery_alchemy.stop()


def failing(found: dict[str, Any], write: Callable[..., None], **options: Any) -> Any:
    """Make a task of the page's kind that writes and then fails."""

    def fail(name: str) -> None:
        write(name)
        raise ZeroDivisionError

    return found["app"].task(base=found["DatabaseTask"], shared=False, name="fail", **options)(fail)


def injected(annotation: Any) -> Callable[..., None]:
    """Return a function whose Session is provided as its annotation says, and which fails after it has written."""

    def fail(name: str, session: Any) -> None:
        session.execute(text("INSERT INTO users (name) VALUES (:name)"), {"name": name})
        raise ZeroDivisionError

    fail.__annotations__["session"] = annotation
    return fail


def test_flask_sqlalchemy(page: Page) -> None:
    found = page("One module, and Flask's Engine")
    flask_app, db, User = (found[name] for name in ("flask_app", "db", "User"))
    alchemy = found["app"]._celery_alchemy
    with flask_app.app_context():
        db.create_all()
    assert flask_app.test_client().post("/users/ada").status_code == 200
    with flask_app.app_context():
        assert [user.name for user in User.query] == ["Ada"], "the task ran after the COMMIT, and was committed"

    def write(name: str) -> None:
        with flask_app.app_context():
            User.query.one().name = name
            db.session.flush()
        assert db.session() is alchemy.session(), "the end of the application context has not removed it"
        db.session.remove()
        assert User.query.one().name == name

    with pytest.raises(ZeroDivisionError):
        failing(found, write).apply(("bob",)).get()
    with flask_app.app_context():
        assert [user.name for user in User.query] == ["Ada"]
        assert not alchemy.in_unit_of_work
        db.session.remove()
        assert not db.session.registry.has()
    with pytest.raises(RuntimeError, match="application context"):
        db.session()


def test_flask_sqlalchemy_lite(page: Page) -> None:
    found = page("Flask-SQLAlchemy-Lite")
    flask_app, db, alchemy, app = (found[name] for name in ("flask_app", "flask_db", "db", "app"))
    Base.metadata.create_all(alchemy.engine)

    def write(name: str) -> None:
        db.session.execute(text("INSERT INTO users (name) VALUES (:name)"), {"name": name})
        assert db.session is alchemy.session()

    with pytest.raises(ZeroDivisionError):
        failing(found, write).apply(("bob",)).get()
    app.task(base=found["DatabaseTask"], shared=False, name="write")(write).apply(("ada",)).get()
    with flask_app.app_context():
        assert db.session is not None
        assert db.session.scalars(text("SELECT name FROM users")).all() == ["ada"]


def test_fastapi_with_an_async_session_is_an_example() -> None:
    """Which tests/test_examples.py starts."""
    section = (
        (DOCS / "fastapi.md").read_text().partition("\n## FastAPI with an AsyncSession\n")[2].partition("\n## ")[0]
    )
    found = blocks(section, "python")
    example = (DOCS.parent / "examples/fastapi_app/shop.py").read_text()
    assert len(found) == 3
    assert all(block in example for block in found)


def test_the_application_factory_is_an_example() -> None:
    """The same: each block of its section is in the file that its first line names."""
    words = (DOCS / "flask.md").read_text().partition("\n## An application factory\n")[2].partition("\n## ")[0]
    found = [block.partition("\n") for block in blocks(words, "python")]
    assert len(found) == 5
    for name, _, code in found:
        assert code in (DOCS.parent / "examples/flask_app" / name.removeprefix("# ")).read_text()


@pytest.mark.parametrize(("own_engine", "most"), [(False, 10), (True, 75)])
def test_the_connections_of_a_flask_application(own_engine: bool, most: int) -> None:
    """As docs/flask.md counts them, for a prefork worker with four processes."""
    flask_app, app = Flask("shop"), Celery(broker="memory://", set_as_current=False)
    url = "postgresql+psycopg://localhost/shop"
    flask_app.config["SQLALCHEMY_DATABASE_URI"] = url
    flasks = SQLAlchemy(flask_app)
    if own_engine:
        with flask_app.app_context():
            alchemy = Alchemy(app, engine=flasks.engine)
    else:
        app.conf.alchemy_database_url = url
        alchemy = Alchemy(app)
    alchemy.start_worker(WorkerPool(name="prefork", concurrency=4))
    assert alchemy.strategy.max_connections == most
    assert f" {most}" in (DOCS / "flask.md").read_text()
    alchemy.stop()


def test_tasks_with_a_context_of_their_own(page: Page, tmp_path: Path) -> None:
    """What docs/flask.md says of `current_app`: a context in a task changes nothing about its Session."""
    found = run_page("from-flask-sqlalchemy.md", tmp_path)
    db, flask_app, User = (found[name] for name in ("db", "flask_app", "User"))
    alchemy = found["app"]._celery_alchemy

    class ContextTask(found["DatabaseTask"]):  # type: ignore[misc]
        abstract = True

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with flask_app.app_context():
                return super().__call__(*args, **kwargs)

    def create(name: str) -> str:
        db.session.add(User(name=name))
        return str(current_flask_app.name)

    with flask_app.app_context():
        db.create_all()
    task = found["app"].task(base=ContextTask, shared=False, name="context")(create)
    assert task.apply(("ada",)).get() == "shop"
    with alchemy.unit_of_work() as session:
        assert [user.name for user in session.query(User)] == ["ada"]
    alchemy.stop()


def test_fastapi_and_sqlmodel(page: Page) -> None:
    from fastapi.testclient import TestClient

    found = page("FastAPI with `def` dependencies, and SQLModel")
    db, Hero = found["db"], found["Hero"]
    Hero.metadata.create_all(db.engine, tables=[Hero.__table__])
    api = found["api"]

    def fail(session: Any) -> None:
        session.add(Hero(name="must not be there"))
        session.flush()
        found["rename_hero"].delay_on_commit("nobody", "x")
        raise ZeroDivisionError

    fail.__annotations__["session"] = found["RequestSession"]
    api.post("/fail")(fail)

    client = TestClient(api, raise_server_exceptions=False)
    for number in range(5):
        assert client.post(f"/heroes/h{number}").json() == f"h{number}"
        assert client.post("/fail").status_code == 500
    with db.unit_of_work() as session:
        assert sorted(hero.name for hero in session.exec(found["select"](Hero))) == [f"H{n}" for n in range(5)]
    assert db.engine.pool.checkedout() == 0
    Hero.metadata.remove(Hero.__table__)


def test_dishka(page: Page) -> None:
    found = page("dishka")
    db, app = found["db"], found["app"]
    Base.metadata.create_all(db.engine)
    found["create_user"].apply(("ada",)).get()

    fail = app.task(base=found["InjectedTask"], shared=False)(injected(found["FromDishka"][found["Session"]]))
    with pytest.raises(ZeroDivisionError):
        fail.apply(("bob",)).get()
    with db.unit_of_work() as session:
        assert session.scalars(text("SELECT name FROM users")).all() == ["ada"]


@pytest.fixture
def no_signals_left() -> Iterator[None]:
    before = [list(signal.receivers or []) for signal in (task_prerun, task_postrun)]
    yield
    for signal, receivers in zip((task_prerun, task_postrun), before, strict=True):
        signal.receivers = receivers
        signal.sender_receivers_cache.clear()


@pytest.mark.usefixtures("no_signals_left")
def test_wireup(page: Page) -> None:
    found = page("wireup")
    db, app = found["db"], found["app"]
    Base.metadata.create_all(db.engine)
    found["create_user"].apply(("ada",)).get()

    wanting = found["inject"](injected(found["Injected"][found["Session"]]))
    fail = app.task(base=found["DatabaseTask"], shared=False)(wanting)
    with pytest.raises(ZeroDivisionError):
        fail.apply(("bob",)).get()
    with db.unit_of_work() as session:
        assert session.scalars(text("SELECT name FROM users")).all() == ["ada"]
