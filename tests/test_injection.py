"""The Session as an argument: filled for the task, invisible to its callers, passed by hand where that is wanted."""

import inspect
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, shared_task
from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.orm import Session
from support.project.models import Base, Row

from celery_alchemy import Alchemy, ConfigurationError, CurrentSession, DatabaseTask


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Celery]:
    app = Celery("shop", broker="memory://", set_as_current=False, task_cls=DatabaseTask)
    app.conf.update(alchemy_database_url=f"sqlite:///{tmp_path}/shop.db", task_always_eager=True)
    db = Alchemy(app)
    Base.metadata.create_all(db.engine)
    yield app
    db.stop()


@pytest.fixture
def by_hand() -> Iterator[Session]:
    with Session() as session:
        yield session


def plain(app: Celery) -> Any:
    @app.task(shared=False)
    def create(name: str, session: CurrentSession, amount: int = 1) -> tuple[str, Session, int]:
        return name, session, amount

    return create


def bound(app: Celery) -> Any:
    @app.task(shared=False, bind=True)
    def create(self: Any, name: str, session: CurrentSession, amount: int = 1) -> tuple[str, Session, int]:
        return name, session, amount

    return create


def class_based(app: Celery) -> Any:
    class Create(DatabaseTask):
        name = "class_based_create"

        def run(self, name: str, session: CurrentSession, amount: int = 1) -> tuple[str, Session, int]:
            return name, session, amount

    return app.register_task(Create())


def shared(app: Celery) -> Any:
    app.set_current()

    name = uuid.uuid4().hex  # a shared task is every later app's too

    @shared_task(base=DatabaseTask, name=name)
    def create(name: str, session: CurrentSession, amount: int = 1) -> tuple[str, Session, int]:
        return name, session, amount

    return app.tasks[name]


def retried(app: Celery) -> Any:
    @app.task(shared=False, autoretry_for=(LookupError,), max_retries=2)
    def create(name: str, session: CurrentSession, amount: int = 1) -> tuple[str, Session, int]:
        return name, session, amount

    return create


@pytest.fixture(params=[plain, bound, class_based, shared, retried], ids=lambda make: make.__name__)
def create(request: pytest.FixtureRequest, app: Celery) -> Any:
    make: Callable[[Celery], Any] = request.param
    return make(app)


def test_it_is_filled_wherever_it_stands(create: Any) -> None:
    for args, kwargs in (
        (("ada",), {}),
        (("ada", 3), {}),
        ((), {"name": "ada", "amount": 3}),
        (("ada",), {"amount": 3}),
    ):
        name, session, amount = create(*args, **kwargs)
        assert (name, amount) == ("ada", 3 if len(args) == 2 or "amount" in kwargs else 1)
        assert isinstance(session, Session)


def test_eagerly_too(create: Any) -> None:
    name, session, amount = create.apply(("ada", 4)).get()
    assert (name, amount) == ("ada", 4)
    assert isinstance(session, Session)


def test_callers_do_not_see_it(create: Any) -> None:
    assert list(inspect.signature(create).parameters) == ["name", "amount"]
    assert list(inspect.signature(create.run).parameters)[-2:] == ["name", "amount"]


def test_it_may_be_passed_by_hand(create: Any, by_hand: Session) -> None:
    assert create("ada", by_hand, 2) == ("ada", by_hand, 2)
    assert create("ada", session=by_hand) == ("ada", by_hand, 1)
    assert create.run("ada", by_hand) == ("ada", by_hand, 1)


def test_celery_checks_the_arguments_without_it(app: Celery, by_hand: Session) -> None:
    create = plain(app)
    app.conf.task_always_eager = False
    for args, kwargs in (((), {}), (("ada", 1, 2), {}), (("ada",), {"session": None}), (("ada",), {"nonsense": 1})):
        with pytest.raises(TypeError):
            create.apply_async(args, kwargs)


def test_each_request_has_its_own_and_it_is_committed(app: Celery) -> None:
    @app.task(shared=False)
    def insert(key: str, session: CurrentSession) -> int:
        session.add(Row(key=key))
        return id(session)

    @app.task(shared=False)
    def insert_two(session: CurrentSession) -> bool:
        session.add(Row(key="outer"))
        return bool(insert("called") == id(session))  # a task called like a function joins its caller's

    insert.delay("ada").get()
    assert insert_two.delay().get() is True

    @app.task(shared=False)
    def keys(session: CurrentSession) -> list[str]:
        return list(session.scalars(select(Row.key).order_by(Row.id)))

    assert keys.delay().get() == ["ada", "outer", "called"]


class Order(BaseModel):
    number: int


def test_beside_pydantic_models(app: Celery) -> None:
    @app.task(shared=False, pydantic=True)
    def place(session: CurrentSession, order: Order, note: str = "") -> str:
        assert isinstance(session, Session)
        return f"{order.number}{note}"

    @app.task(shared=False, pydantic=True, bind=True)
    def place_bound(self: Any, note: str, *, session: CurrentSession, order: Order) -> str:
        assert session is self.db
        return f"{order.number}{note}"

    assert place.delay({"number": 3}).get() == "3"
    assert place.delay(order={"number": 4}, note="!").get() == "4!"
    assert place_bound.delay("?", order={"number": 5}).get() == "5?"
    if hasattr(DatabaseTask, "_dump_pydantic_arguments"):  # Celery 5.7: callers may pass models
        assert place.delay(Order(number=6), "!").get() == "6!"
        assert place_bound.delay("!", order=Order(number=7)).get() == "7!"


def test_annotations_that_are_text(app: Celery) -> None:
    """As under `from __future__ import annotations`; one that exists for type checkers only hides no other."""
    names: dict[str, Any] = {"app": app, "CurrentSession": CurrentSession}
    exec(
        "from __future__ import annotations\n"
        "@app.task(shared=False)\n"
        "def create(name: OnlyForTypeCheckers, session: CurrentSession) -> bool:\n"
        "    return session is not None\n",
        names,
    )
    assert names["create"].delay("ada").get() is True


def test_two_and_a_positional_one(app: Celery) -> None:
    @app.task(shared=False)
    def create(first: CurrentSession, /, name: str, second: CurrentSession) -> bool:
        return first is second and name == "ada"

    assert create("ada") is True
    assert create(name="ada") is True


def test_where_no_session_can_stand_it_is_refused(app: Celery) -> None:
    with pytest.raises(ConfigurationError, match="sessions is annotated with CurrentSession"):

        @app.task(shared=False)
        def create(*sessions: CurrentSession) -> None: ...

        create.name  # noqa: B018 - the decorator makes the task when it is looked at


def test_without_it_nothing_changes(app: Celery) -> None:
    @app.task(shared=False)
    def create(name: str, session: Session | None = None) -> Any:
        return session

    assert create("ada") is None
    assert list(inspect.signature(create).parameters) == ["name", "session"]
