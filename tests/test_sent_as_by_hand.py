"""What `delay_on_commit` sends after the COMMIT goes the way of an `apply_async` by hand."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.signals import before_task_publish
from sqlalchemy import text

from celery_alchemy import Alchemy, DatabaseTask


class Shop:
    """An app with a task that sends another, and what its workers would get."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self.app = app = Celery("by_hand", broker="memory://", set_as_current=False)
        self.queue = f"celery-{path.name}"  # of this test: the broker is one for the process
        app.conf.update(alchemy_database_url=f"sqlite:///{path}/shop.db", task_default_queue=self.queue, **settings)
        self.db = Alchemy(app)
        self.ran: list[tuple[Any, int]] = []
        shop = self

        @app.task(base=DatabaseTask, bind=True, shared=False, name="inner")
        def inner(self: DatabaseTask, number: int) -> None:
            shop.ran.append((self, number))

        @app.task(base=DatabaseTask, bind=True, shared=False, name="outer")
        def outer(self: DatabaseTask, number: int) -> str:
            self.db.execute(text("SELECT 1"))
            result = inner.delay_on_commit(number)
            assert not shop.ids()
            return str(result.id)

        self.inner, self.outer = inner, outer

    def ids(self) -> list[str]:
        """Return the ids of the messages, and take them."""
        found = []
        with self.app.connection_for_read() as connection, connection.SimpleQueue(self.queue) as queue:
            while queue.qsize():
                message = queue.get_nowait()
                message.ack()
                found.append(message.headers["id"])
        return found


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    made = Shop(tmp_path)
    yield made
    made.db.dispose()


def test_the_message_has_the_id_of_the_call(shop: Shop) -> None:
    for number in range(2):
        assert [shop.outer.apply((number,)).get()] == shop.ids()


def test_an_agent_that_wraps_celery_sees_the_task(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = Celery.send_task

    def send_task(self: Any, *args: Any, **options: Any) -> Any:
        seen.append((self, options["task_type"].name, isinstance(options["task_type"], type(shop.app.tasks["inner"]))))
        return original(self, *args, **options)

    monkeypatch.setattr(Celery, "send_task", send_task)
    assert [shop.outer.apply((1,)).get()] == shop.ids()
    assert seen == [(shop.app, "inner", True)]


def test_a_send_task_that_is_put_over_ours_is_asked(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    ours = shop.app.send_task

    @functools.wraps(ours)
    def send_task(name: str, *args: Any, **options: Any) -> Any:
        seen.append(name)
        return ours(name, *args, **options)

    monkeypatch.setattr(shop.app, "send_task", send_task)
    assert [shop.outer.apply((1,)).get()] == shop.ids()
    assert seen == ["inner"]


def test_what_a_receiver_sends_goes_at_once(shop: Shop) -> None:
    sent = []

    def receive(sender: str, **_: Any) -> None:
        if not sent:
            sent.append(None)
            sent.append(shop.inner.delay_on_commit(2).id)

    before_task_publish.connect(receive, weak=False)
    try:
        first = shop.outer.apply((1,)).get()
    finally:
        before_task_publish.disconnect(receive)
    assert sorted(shop.ids()) == sorted([first, sent[1]])


def test_an_eager_task_runs_after_the_commit_as_itself(tmp_path: Path) -> None:
    shop = Shop(tmp_path, task_always_eager=True)
    shop.outer.apply((7,)).get()
    assert shop.ran == [(shop.inner, 7)]
    assert shop.ran[0][0] is shop.app.tasks["inner"]
    shop.db.dispose()


class Counting(DatabaseTask):
    """Keeps what its `shadow_name` has seen."""

    abstract = True
    count = 0

    def shadow_name(self, args: Any, kwargs: Any, options: Any) -> str:
        self.count += 1
        return f"shadow {self.count}"


class Slotted:
    __slots__ = ("kept",)


class WithSlots(Slotted, DatabaseTask):
    """Has an attribute that is not in its `__dict__`."""

    abstract = True

    def __init__(self) -> None:
        super().__init__()
        self.kept = "kept"


@pytest.mark.parametrize("base", [Counting, WithSlots])
def test_a_method_and_an_agent_see_the_task_itself(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, base: type[DatabaseTask]
) -> None:
    """`shadow_name` changes the task; `send_task` is given one whose slots are filled."""
    seen: list[Any] = []
    original = Celery.send_task

    def send_task(self: Any, *args: Any, **options: Any) -> Any:
        seen.append((getattr(options["task_type"], "kept", None), options.get("shadow")))
        return original(self, *args, **options)

    monkeypatch.setattr(Celery, "send_task", send_task)

    @shop.app.task(base=base, shared=False, name="other")
    def other() -> None:
        pass

    @shop.app.task(base=DatabaseTask, shared=False, name="sends")
    def sends() -> None:
        other.delay_on_commit()

    for _ in range(2):
        sends.apply().get()
    if base is Counting:
        assert [shadow for _, shadow in seen] == ["shadow 1", "shadow 2"]
        assert shop.app.tasks["other"].count == 2
    else:
        assert [kept for kept, _ in seen] == ["kept"] * 2
