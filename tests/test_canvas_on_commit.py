"""`db.delay_on_commit` and `db.apply_async_on_commit`: signatures, chains, groups, chords, any task."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.result import ResultBase
from sqlalchemy.orm import Session
from support import shop
from support.project.models import Row

from celery_alchemy import CeleryAlchemyError, ConfigurationError, DatabaseTask, late


class Shop(shop.Shop):
    def __init__(self, path: Path, **settings: Any) -> None:
        super().__init__(path, result_backend="cache+memory://", **settings)

        @self.app.task(base=DatabaseTask, bind=True, shared=False, name="ours")
        def ours(task: Any, *args: Any) -> None:
            self.ran.append((task.request.id, args))

        @self.app.task(bind=True, shared=False, name="plain")
        def plain(task: Any, *args: Any) -> None:
            self.ran.append((task.request.id, args))

        self.ours, self.plain = ours, plain

    def sent(self) -> list[tuple[str, str, Any]]:
        """Return id, name and arguments of the messages that have arrived since the last look."""
        return [(one.headers["id"], one.headers["task"], one.decode()[0]) for one in self.messages()]


@pytest.fixture(params=[False, True], ids=["", "outbox"])
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(tmp_path / "shop.db", alchemy_outbox=request.param)
    yield shop
    shop.close()


WHAT: dict[str, Callable[[Shop], Any]] = {
    "task": lambda shop: shop.plain,
    "DatabaseTask": lambda shop: shop.ours,
    "name": lambda shop: "plain",
    "signature": lambda shop: shop.ours.s(),
    "chain": lambda shop: chain(shop.ours.s(), shop.plain.s("second")),
    "group": lambda shop: group(shop.ours.s(), shop.plain.s()),
    "chord": lambda shop: chord([shop.ours.s(), shop.plain.s()], shop.plain.si("body")),
    "chain of a group": lambda shop: chain(group(shop.ours.s(), shop.plain.s()), shop.plain.si("body")),
}


def ids_of(result: ResultBase) -> set[str]:
    """Return the ids of the tasks that a result knows of."""
    found = {one.id for one in getattr(result, "results", [])} or {result.id}
    return found | (ids_of(result.parent) if result.parent is not None else set())


def tasks_in(shop: Shop) -> list[tuple[str, str, Any]]:
    return [one for one in shop.sent() if one[1] in {"plain", "ours"}]


@pytest.fixture(params=WHAT)
def what(request: pytest.FixtureRequest, shop: Shop) -> Any:
    return WHAT[request.param](shop)


def expected(sent: Any) -> int:
    return 2 if isinstance(sent, group | chord) or (isinstance(sent, chain) and isinstance(sent.tasks[0], group)) else 1


@pytest.mark.parametrize("argument", ["usual", "late"])
def test_it_waits_under_ids_that_are_known_at_the_call(shop: Shop, what: Any, argument: str) -> None:
    count = expected(what)
    with shop.db.unit_of_work() as session:
        session.add(Row(key="k"))
        result = shop.db.delay_on_commit(what, late(lambda: "first") if argument == "late" else "first")
        assert shop.sent() == []
    sent = tasks_in(shop)
    assert len(sent) == count
    assert all(arguments[0] == "first" for _, _, arguments in sent)
    assert {task_id for task_id, _, _ in sent} <= ids_of(result)


@pytest.mark.parametrize("argument", ["usual", "late"])
def test_a_rollback_drops_it(shop: Shop, what: Any, argument: str) -> None:
    with pytest.raises(ZeroDivisionError), shop.db.unit_of_work() as session:
        session.add(Row(key="k"))
        shop.db.delay_on_commit(what, late(lambda: "first") if argument == "late" else "first")
        raise ZeroDivisionError
    assert shop.sent() == []


def test_a_session_of_the_web_application(shop: Shop, what: Any) -> None:
    with Session(shop.engine) as session:
        session.add(Row(key="k"))
        result = shop.db.apply_async_on_commit(what, ("first",), session=session, countdown=0)
        assert shop.sent() == []
        session.commit()
        assert {task_id for task_id, _, _ in tasks_in(shop)} <= ids_of(result)
        session.add(Row(key="k"))
        shop.db.apply_async_on_commit(what, ("first",), session=session)
        session.rollback()
        assert shop.sent() == []


def test_outside_it_is_sent_at_once(shop: Shop, what: Any) -> None:
    shop.db.delay_on_commit(what, "first")
    assert len(tasks_in(shop)) == expected(what)


def test_it_may_be_sent_more_than_once(shop: Shop, what: Any) -> None:
    """What is given is not changed: each call has ids of its own."""
    with shop.db.unit_of_work() as session:
        session.add(Row(key="k"))
        results = [shop.db.delay_on_commit(what, late(lambda: "first")) for _ in range(2)]
    ids = [task_id for task_id, _, _ in tasks_in(shop)]
    assert len(set(ids)) == len(ids) == 2 * expected(what)
    assert set(ids) <= ids_of(results[0]) | ids_of(results[1])


@pytest.mark.parametrize("name", WHAT)
def test_eager(tmp_path: Path, name: str) -> None:
    shop = Shop(tmp_path / "eager.db", task_always_eager=True)
    what = WHAT[name](shop)
    with pytest.raises(ZeroDivisionError), shop.db.unit_of_work() as session:
        session.add(Row(key="k"))
        shop.db.delay_on_commit(what, "first")
        raise ZeroDivisionError
    assert shop.ran == []
    with shop.db.unit_of_work() as session:
        session.add(Row(key="k"))
        result = shop.db.delay_on_commit(what, "first")
        assert shop.ran == []
    assert shop.ran[0][1] == ("first",)
    if name in {"task", "DatabaseTask", "name", "signature"}:
        assert shop.ran[0][0] == result.id
    shop.close()


def test_what_cannot_be_sent_is_refused(shop: Shop) -> None:
    with pytest.raises(ConfigurationError, match=r"got a function.*db\.on_commit"):
        shop.db.delay_on_commit(lambda: None)
    with pytest.raises(ConfigurationError, match=r"run the task in this process.*delay_on_commit"):
        shop.db.on_commit(shop.plain.s(1))
    other = Celery("other", broker="memory://", set_as_current=False)
    with pytest.raises(ConfigurationError, match="the Celery app 'other', which has no Alchemy"):
        shop.db.delay_on_commit(other.signature("plain"), 1)
    other.close()


WRONG: dict[str, tuple[Callable[[Shop, Session], Any], type[Exception], str]] = {
    "a misspelt session": (
        lambda shop, session: shop.ours.apply_async_on_commit((1,), sesion=session),
        CeleryAlchemyError,
        "Did you mean 'session'?",
    ),
    "a Session by another name": (
        lambda shop, session: shop.ours.apply_async_on_commit((1,), transaction=session),
        CeleryAlchemyError,
        "Did you mean 'session'?",
    ),
    "a misspelt countdown": (
        lambda shop, session: shop.db.apply_async_on_commit("plain", (1,), countdwn=5),
        CeleryAlchemyError,
        "Did you mean 'countdown'?",
    ),
    "no tuple": (lambda shop, session: shop.ours.apply_async_on_commit("ab"), TypeError, "must be a tuple or a list"),
    "a number": (lambda shop, session: shop.ours.apply_async_on_commit(1), TypeError, "must be a tuple or a list"),
    "two arguments": (
        lambda shop, session: shop.ours.apply_async_on_commit(("a",), "b"), TypeError, "must be a dict"
    ),
    "what was sent already": (
        lambda shop, session: shop.db.on_commit(shop.plain.delay(1)), ConfigurationError, "needs a function"
    ),
    "a word": (lambda shop, session: shop.db.on_commit("ours"), ConfigurationError, "got a str"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_meant_is_refused_at_the_call(shop: Shop, what: str) -> None:
    call, kind, words = WRONG[what]
    with shop.db.unit_of_work() as session:
        session.add(Row(key="wrong"))
        with pytest.raises(kind, match=re.escape(words)):
            call(shop, session)


def test_other_options_are_handed_on(shop: Shop) -> None:
    """Celery gives what it does not know to the broker, as a property of the message."""
    with shop.db.unit_of_work():
        shop.ours.apply_async_on_commit((1,), correlation="seven", priority=3)
    (message,) = shop.messages()
    assert message.properties["correlation"] == "seven"
