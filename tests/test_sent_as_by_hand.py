"""What `delay_on_commit` sends after the COMMIT goes the way of an `apply_async` by hand."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, Task
from celery.signals import before_task_publish
from sqlalchemy import text

from celery_alchemy import Alchemy, DatabaseTask
from celery_alchemy.workers import _celery


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
        return [message.headers["id"] for message in self.messages()]

    def messages(self) -> list[Any]:
        """Return the messages, and take them."""
        found = []
        with self.app.connection_for_read() as connection, connection.SimpleQueue(self.queue) as queue:
            while queue.qsize():
                message = queue.get_nowait()
                message.ack()
                found.append(message)
        return found

    def send_twice(self) -> list[Any]:
        """Return the messages that two runs of `outer` send; what is known since the first is used by the second."""
        return [message for number in (1, 2) if self.outer.apply((number,)).get() for message in self.messages()]


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


OPTIONS = {"expires": 60, "time_limit": 20, "soft_time_limit": 10, "ignore_result": True, "compression": "zlib"}


def written_by(message: Any) -> dict[str, Any]:
    """Return what the two ways of sending write, but for the ids and the time."""
    left_out = {"id", "root_id", "parent_id", "origin", "expires"}
    properties = {
        name: value for name, value in message.properties.items() if name not in {"correlation_id", "delivery_tag"}
    }
    headers = {name: value for name, value in message.headers.items() if name not in left_out}
    return {**headers, "properties": properties, "body": message.payload, "expires": bool(message.headers["expires"])}


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "with options"])
def test_every_message_is_the_one_of_apply_async(shop: Shop, options: dict[str, Any]) -> None:
    @shop.app.task(base=DatabaseTask, shared=False, name="noted", **options)
    def noted(number: int, word: str = "") -> None:
        pass

    @shop.app.task(base=DatabaseTask, shared=False, name="sends")
    def sends(by_hand: bool, number: int) -> None:
        if by_hand:
            noted.apply_async((number,), {"word": "w"})
        else:
            noted.delay_on_commit(number, word="w")

    for number in range(3):
        for by_hand in (True, False):
            sends.apply((by_hand, number)).get()
        by_hand_, ours = shop.messages()
        assert written_by(ours) == written_by(by_hand_)


def test_what_apply_async_finds_is_found_once(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = DatabaseTask._get_exec_options
    monkeypatch.setattr(Task, "_get_exec_options", lambda self: (asked.append(self.name), original(self))[1])
    assert len(shop.send_twice()) == 2
    assert asked == ["inner"]


def test_all_that_apply_async_reads_of_a_task_is_compared() -> None:
    """A Celery that reads more must be read first, and then named in `_READ_UP_TO`."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(Task.apply_async))).body
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    compared = {"_get_exec_options", "ignore_result", "soft_time_limit", "time_limit", "shadow_name", "_get_app"}
    at_the_call = {"typing", "__header__", "name", "AsyncResult"}
    refused_before = {"_dump_pydantic_arguments", "__v2_compat__"}
    where_it_is_eager = {"apply"}
    assert read <= compared | at_the_call | refused_before | where_it_is_eager


def test_a_newer_celery_is_asked_for_each_message(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = DatabaseTask._get_exec_options
    monkeypatch.setattr(Task, "_get_exec_options", lambda self: (asked.append(self.name), original(self))[1])
    monkeypatch.setattr(_celery, "VERSION", (5, 8, 0))
    assert len(shop.send_twice()) == 2
    assert asked == ["inner"] * 2


def change_ignore_result(shop: Shop) -> None:
    shop.inner.ignore_result = True


def change_a_limit(shop: Shop) -> None:
    shop.inner.soft_time_limit = 7


def change_what_is_kept(shop: Shop) -> None:
    shop.inner.time_limit = 8
    shop.inner._exec_options = None


@pytest.mark.parametrize(
    ("change", "header"),
    [(change_ignore_result, "ignore_result"), (change_a_limit, "timelimit"), (change_what_is_kept, "timelimit")],
)
def test_a_task_that_is_changed_is_looked_at_again(shop: Shop, change: Callable[[Shop], None], header: str) -> None:
    """Celery keeps some of what it has found, which differs between versions; a message by hand tells."""
    shop.send_twice()
    change(shop)
    shop.inner.apply_async((1,))
    (by_hand,) = shop.messages()
    assert [message.headers[header] for message in shop.send_twice()] == [by_hand.headers[header]] * 2


def test_limits_that_contradict_are_refused_later_too(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    shop.send_twice()
    shop.inner.soft_time_limit, shop.inner.time_limit = 9, 8
    assert shop.send_twice() == []
    assert "soft_time_limit must be less than or equal to time_limit" in caplog.text


def by_assignment(app: Celery) -> None:
    app.conf.task_always_eager = True


def by_defaults(app: Celery) -> None:
    app.add_defaults({"task_always_eager": True})


def by_other_settings(app: Celery) -> None:
    app.config_from_object({"task_always_eager": True, **{key: app.conf[key] for key in KEPT}}, force=True)


KEPT = ("alchemy_database_url", "task_default_queue")


@pytest.mark.parametrize("switch_on", [by_assignment, by_defaults, by_other_settings])
def test_a_task_that_becomes_eager_is_sent_no_more(shop: Shop, switch_on: Callable[[Celery], None]) -> None:
    assert len(shop.send_twice()) == 2
    switch_on(shop.app)
    assert shop.app.conf.task_always_eager
    assert shop.send_twice() == []
    assert [number for _, number in shop.ran] == [1, 2]
    shop.app.conf.task_always_eager = False
    assert len(shop.send_twice()) == 2


def test_an_agent_around_apply_async_sees_each_message(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes when messages have been sent, and goes again."""
    seen = []
    original = Task.apply_async

    @functools.wraps(original)
    def apply_async(self: Any, *args: Any, **options: Any) -> Any:
        seen.append(self)
        return original(self, *args, headers={"traced": len(seen)}, **options)

    shop.send_twice()
    monkeypatch.setattr(Task, "apply_async", apply_async)
    assert [message.headers["traced"] for message in shop.send_twice()] == [1, 2]
    assert seen == [shop.inner] * 2
    monkeypatch.undo()
    assert [message.headers.get("traced") for message in shop.send_twice()] == [None] * 2
    assert len(seen) == 2


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
