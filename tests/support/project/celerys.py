"""Tasks around which Celery itself sends: retries, replacements, chains, chords, links; with whatever stands between.

`traced` in the settings of the project says which tracing agent is on, as its documentation puts it on.
"""

import os
from typing import Any

from celery import Task, chain, chord, group
from celery.exceptions import Ignore, Retry
from celery.result import allow_join_result
from celery_once import QueueOnce

from celery_alchemy import DatabaseTask
from support.project import tools
from support.project.app import app, db, task
from support.project.endings import Boom
from support.project.models import Row

AGENT = os.environ.get("TRACING_AGENT", "")

if AGENT == "sentry":
    import sentry_sdk
    from sentry_sdk.integrations.celery import CeleryIntegration

    sentry_sdk.init(
        dsn="http://public@127.0.0.1:9/1",
        transport=lambda event: None,
        traces_sample_rate=1.0,
        integrations=[CeleryIntegration()],
    )
if AGENT == "opentelemetry":
    from opentelemetry import trace
    from opentelemetry.instrumentation.celery import CeleryInstrumentor
    from opentelemetry.sdk.trace import TracerProvider

    trace.set_tracer_provider(TracerProvider())
    CeleryInstrumentor().instrument()


@app.task
def hear(*args: Any) -> Any:
    """Say what everyone can see when this message has arrived; the last arguments are its name and the key."""
    *_, what, key = args
    tools.say(key, [what, tools.committed(key)])
    return what


def canvas(how: str, key: str) -> Any:
    """Return what a task is replaced by; the last that says something says "last"."""
    one, two, last = hear.si("one", key), hear.si("two", key), hear.si("last", key)
    return {
        "signature": last,
        "chain": chain(one, last),
        "group": group(one, last),
        "chord": chord([one, two], last),
        "chord of chains": chord([chain(one, two), two], chain(one, last)),
        "chain of chords": chain(one, chord([one, two], last)),
        "chain that begins with a group": chain(group(one, two), last),
        "nested groups": group(one, group(two, last)),
    }[how]


# -- tasks that are no DatabaseTask, in a block ---------------------------------------------------------------------


@app.task(bind=True)
def plain_retry(self: Any, key: str) -> str:
    with db.unit_of_work() as session:
        session.add(Row(key=key, note=f"attempt {self.request.retries}"))
        if self.request.retries == 0:
            raise self.retry(countdown=0)
    return "second"


@app.task(bind=True)
def plain_replace(self: Any, how: str, key: str) -> Any:
    with db.unit_of_work() as session:
        session.add(Row(key=key, note="undone"))
        return self.replace(canvas(how, key))


@app.task(bind=True, autoretry_for=(Boom,), default_retry_delay=0)
def plain_autoretry(self: Any, key: str) -> str:
    with db.unit_of_work() as session:
        session.add(Row(key=key, note=f"attempt {self.request.retries}"))
        if self.request.retries == 0:
            raise Boom("on purpose")
    return "second"


class HandMade(Task):
    """Retries and replaces without Celery's own methods."""

    abstract = True

    def retry(self, *args: Any, **options: Any) -> Any:
        self.apply_async(
            self.request.args, self.request.kwargs, task_id=self.request.id, retries=self.request.retries + 1
        )
        raise Retry(when=0)

    def replace(self, sig: Any) -> Any:
        sig.freeze(self.request.id)
        sig.delay()
        raise Ignore("replaced by hand")


@app.task(bind=True, base=HandMade)
def plain_retry_by_hand(self: Any, key: str) -> str:
    with db.unit_of_work() as session:
        session.add(Row(key=key, note=f"attempt {self.request.retries}"))
        if self.request.retries == 0:
            self.retry()
    return "second"


@app.task(bind=True, base=HandMade)
def plain_replace_by_hand(self: Any, how: str, key: str) -> Any:
    with db.unit_of_work() as session:
        session.add(Row(key=key, note="undone"))
        return self.replace(canvas(how, key))


# -- DatabaseTasks ---------------------------------------------------------------------------------------------------


class Overriding(DatabaseTask):
    """Overrides everything that stands between a task and its message."""

    abstract = True

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        options["headers"] = {**(options.get("headers") or {}), "tenant": "acme"}
        return super().apply_async(args, kwargs, **options)

    def retry(self, *args: Any, **options: Any) -> Any:
        return super().retry(*args, **options)

    def replace(self, sig: Any) -> Any:
        return super().replace(sig)

    def on_replace(self, sig: Any) -> Any:
        return super().on_replace(sig)


@app.task(bind=True, base=Overriding)
def overriding_retry(self: Any, key: str) -> list[Any]:
    self.db.add(Row(key=key, note=f"attempt {self.request.retries}"))
    if self.request.retries == 0:
        raise self.retry(countdown=0)
    return ["second", self.request.tenant]


@app.task(bind=True, base=Overriding, autoretry_for=(Boom,), default_retry_delay=0)
def overriding_autoretry(self: Any, key: str) -> str:
    self.db.add(Row(key=key, note=f"attempt {self.request.retries}"))
    if self.request.retries == 0:
        raise Boom("on purpose")
    return "second"


@app.task(bind=True, base=Overriding)
def overriding_replace(self: Any, how: str, key: str) -> Any:
    self.db.add(Row(key=key, note="replaced"))
    self.db.flush()
    return self.replace(canvas(how, key))


app.conf.ONCE = {
    "backend": "celery_once.backends.Redis",
    "settings": {"url": tools.config["broker_url"].replace("?virtual_host=", "?db="), "default_timeout": 60},
}


class Once(QueueOnce, DatabaseTask):
    abstract = True


@app.task(bind=True, base=Once)
def once_retry(self: Any, key: str) -> str:
    """Holds a lock from its first message on, over its retries."""
    self.db.add(Row(key=key, note=f"attempt {self.request.retries}"))
    if self.request.retries == 0:
        raise self.retry(countdown=0)
    return "second"


@task()
def send_once(self: Any, key: str, ending: str) -> None:
    """The first is undone, and takes no lock that the second would meet."""
    self.db.add(Row(key=key, note="row"))
    if ending == "raise":
        once_hear.delay(key)
        raise Boom("on purpose")
    once_hear.delay(key)


@app.task(base=Once)
def once_hear(key: str) -> None:
    hear("once", key)


class HandMadeDatabaseTask(HandMade, DatabaseTask):
    abstract = True


@app.task(bind=True, base=HandMadeDatabaseTask)
def retry_by_hand(self: Any, key: str) -> str:
    self.db.add(Row(key=key, note=f"attempt {self.request.retries}"))
    if self.request.retries == 0:
        self.retry()
    return "second"


@app.task(bind=True, base=HandMadeDatabaseTask)
def replace_by_hand(self: Any, how: str, key: str) -> Any:
    self.db.add(Row(key=key, note="undone"))
    return self.replace(canvas(how, key))


@task(autoretry_for=(Boom,), default_retry_delay=0)
def usual_autoretry(self: Any, key: str) -> str:
    self.db.add(Row(key=key, note=f"attempt {self.request.retries}"))
    if self.request.retries == 0:
        raise Boom("on purpose")
    return "second"


@task()
def retry_in_a_block(self: Any, key: str) -> str:
    """The retry is of the task, whose unit of work is not the innermost one."""
    with db.unit_of_work() as session:
        session.add(Row(key=key, note=f"attempt {self.request.retries}"))
        if self.request.retries == 0:
            raise self.retry(countdown=0)
    return "second"


@app.task(bind=True)
def plain_retry_of_the_caller(self: Any, key: str) -> str:
    """The task that retries is not the innermost one that runs."""
    with db.unit_of_work():
        return str(calls_back(lambda: None if self.request.retries else self.retry(countdown=0)))


@task()
def calls_back(self: Any, function: Any) -> str:
    function()
    return "second"


@app.task(bind=True)
def block_that_sends(self: Any, key: str) -> str:
    with db.unit_of_work() as session:
        session.add(Row(key=key, note="row"))
        session.flush()
        hear.delay(key, "sent", key)  # a watched key is looked for in front
    return "block"


@app.task(bind=True)
def succeeds(self: Any, key: str) -> str:
    return "succeeds"


@app.task(bind=True)
def fails(self: Any, key: str) -> str:
    raise Boom("on purpose")


@app.task(bind=True)
def eager_in_a_block(self: Any, what: str, key: str) -> None:
    """What Celery sends for a task that was run eagerly does not wait for the block around that."""
    with db.unit_of_work() as session:
        session.add(Row(key=key, note="undone"))
        called = app.tasks[what]
        called.apply((key,), link=hear.si("link", key), link_error=hear.si("link_error", key), throw=False)
        session.rollback()


@task()
def replaced_by_a_block(self: Any, key: str) -> Any:
    return self.replace(block_that_sends.si(key))


@app.task(bind=True)
def run_eagerly(self: Any, what: str, key: str) -> None:
    """The replacement runs inside `replace`; what its own code sends waits for its own block all the same."""
    with allow_join_result():  # `replace` waits for the eager one
        app.tasks[what].apply((key,), throw=True)
