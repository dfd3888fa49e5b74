"""The same task, defined in every way that Celery knows: writes a row, and fails when told to."""

import functools
from collections.abc import Callable
from typing import Any

from celery import Celery, Task, shared_task
from pydantic import BaseModel

from celery_alchemy import Alchemy, CurrentSession, DatabaseTask
from support.project.models import Row


class Refused(Exception):
    """What the task raises when told to fail."""


def write(session: Any, key: str, fails: bool) -> str:
    session.add(Row(key=key, note="written"))
    session.flush()
    if fails:
        raise Refused
    return key


class Counting(Task):
    """A base class of the user's, with a `__call__` of its own."""

    abstract = True
    calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        type(self).calls += 1
        return super().__call__(*args, **kwargs)


class Running(Task):
    """One whose `__call__` calls `run`, as older documentation shows."""

    abstract = True
    calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        type(self).calls += 1
        return self.run(*args, **kwargs)


#: The calls of the function that `task_annotations` puts around a task's `run`.
AROUND: list[Any] = []


class LikeDjangos(Task):
    """Shaped like celery.contrib.django.task.DjangoTask, which knows another database."""

    abstract = True

    def delay_on_commit(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError


class MixedBefore(DatabaseTask, Counting):
    abstract = True


class MixedAfter(Counting, DatabaseTask):
    abstract = True


class MixedBeforeRunning(DatabaseTask, Running):
    abstract = True


class MixedAfterRunning(Running, DatabaseTask):
    abstract = True


class MixedWithDjangos(DatabaseTask, LikeDjangos):
    abstract = True


class MixedAfterDjangos(LikeDjangos, DatabaseTask):
    abstract = True


class House(DatabaseTask):
    """A user's base class between ours and the task."""

    abstract = True

    def __init__(self) -> None:
        super().__init__()
        self.made = True


class Stamping(DatabaseTask):
    """Its `__call__` writes too: around `run`, in the same transaction."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.db.add(Row(key=f"{args[0]}-stamp", note="stamped"))
        return super().__call__(*args, **kwargs)


class Order(BaseModel):
    key: str
    fails: bool = False


class Receipt(BaseModel):
    key: str


def counted(run: Callable[..., Any]) -> Callable[..., Any]:
    """What `task_annotations = {"...": {"@run": counted}}` puts around `run`."""

    @functools.wraps(run)
    def around(*args: Any, **kwargs: Any) -> Any:
        AROUND.append(args)
        return run(*args, **kwargs)

    return around


@shared_task(base=DatabaseTask, bind=True, name="shared")
def shared(self: Any, key: str, fails: bool = False) -> str:
    return write(self.db, key, fails)


class ClassBased(DatabaseTask):
    name = "class_based"

    def run(self, key: str, fails: bool = False) -> str:
        return write(self.db, key, fails)


class ClassBasedWithRetry(DatabaseTask):
    name = "class_based_with_retry"
    autoretry_for = (Refused,)
    retry_backoff = False
    default_retry_delay = 0
    max_retries = 1

    def run(self, key: str, fails: bool = False) -> str:
        return write(self.db, key, fails)


class ClassBasedSubclass(ClassBased):
    """Calls the `run` it inherits."""

    name = "class_based_subclass"

    def run(self, key: str, fails: bool = False) -> str:
        return super().run(key, fails)


class ClassBasedInheriting(ClassBased):
    """Has no `run` of its own."""

    name = "class_based_inheriting"


def define(app: Celery, db: Alchemy) -> None:
    """Define the task in every way, in `app`."""
    app.conf.task_annotations = {"annotated": {"@run": counted}}

    @app.task(base=DatabaseTask, name="plain")
    def plain(key: str, fails: bool = False) -> str:
        return write(db.session, key, fails)

    bases: dict[str, type[Task]] = {
        "bound": DatabaseTask,
        "annotated": DatabaseTask,
        "house": House,
        "mixed_before": MixedBefore,
        "mixed_after": MixedAfter,
        "mixed_before_running": MixedBeforeRunning,
        "mixed_after_running": MixedAfterRunning,
        "mixed_with_djangos": MixedWithDjangos,
        "mixed_after_djangos": MixedAfterDjangos,
        "stamping": Stamping,
    }
    for name, base in bases.items():

        @app.task(base=base, bind=True, name=name)
        def bound(self: Any, key: str, fails: bool = False) -> str:
            return write(self.db, key, fails)

    @app.task(base=DatabaseTask, bind=True, name="keyword_only")
    def keyword_only(self: Any, /, key: str, *rest: Any, fails: bool = False, **more: Any) -> str:
        return write(self.db, key, fails or bool(rest and rest[0]))

    @app.task(base=DatabaseTask, bind=True, name="autoretried", autoretry_for=(Refused,), default_retry_delay=0,
              retry_backoff=False, retry_kwargs={"max_retries": 1})  # fmt: skip
    def autoretried(self: Any, key: str, fails: bool = False) -> str:
        return write(self.db, key, fails)

    @app.task(base=DatabaseTask, bind=True, name="validated", pydantic=True)
    def validated(self: Any, order: Order) -> Receipt:
        return Receipt(key=write(self.db, order.key, order.fails))

    @db.task(name="db_task")
    def db_task(self: DatabaseTask, key: str, fails: bool = False) -> str:
        return write(self.db, key, fails)

    @db.task(name="db_task_injected", base=House)
    def db_task_injected(session: CurrentSession, key: str, fails: bool = False) -> str:
        return write(session, key, fails)

    for task_class in (ClassBased, ClassBasedWithRetry, ClassBasedSubclass, ClassBasedInheriting):
        app.register_task(task_class())


#: Called as `task(key, fails)`, all of them; "validated" takes one dict.
NAMES = [
    "plain", "bound", "annotated", "house", "keyword_only", "autoretried", "validated", "shared",
    "class_based", "class_based_with_retry", "class_based_subclass", "class_based_inheriting",
    "mixed_before", "mixed_after", "mixed_before_running", "mixed_after_running", "mixed_with_djangos",
    "mixed_after_djangos", "stamping", "db_task", "db_task_injected",
]  # fmt: skip


def arguments(name: str, key: str, fails: bool) -> tuple[Any, ...]:
    return ({"key": key, "fails": fails},) if name == "validated" else (key, fails)
