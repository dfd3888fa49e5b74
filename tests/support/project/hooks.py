"""Tasks whose before_start, on_success, on_failure, on_retry and after_return write rows."""

import time
from typing import Any

from celery_alchemy import DatabaseTask
from support.project.app import app
from support.project.endings import Boom
from support.project.models import Row


class Journal(DatabaseTask):
    """Write one row per hook, and never say commit."""

    abstract = True

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        self.db.add(Row(key=args[0], note="before_start"))

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        self.db.add(Row(key=args[0], note="on_success"))

    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        self.db.add(Row(key=args[0], note="on_failure"))

    def on_retry(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        self.db.add(Row(key=args[0], note="on_retry"))

    def after_return(self, status: Any, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        self.db.add(Row(key=args[0], note="after_return"))


@app.task(base=Journal, bind=True)
def journal(self: Any, key: str, ending: str) -> None:
    self.db.add(Row(key=key, note=f"body {self.request.retries}"))
    self.db.flush()
    if ending == "failure":
        raise Boom("on purpose")
    if ending == "retry" and self.request.retries == 0:
        raise self.retry(countdown=0)


@app.task(base=Journal, bind=True, time_limit=1)
def journal_hung(self: Any, key: str) -> None:
    """Killed by the hard time limit: on_failure runs in the prefork parent."""
    self.db.add(Row(key=key, note="body"))
    self.db.flush()
    time.sleep(60)


class FailingHook(DatabaseTask):
    abstract = True

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        self.db.add(Row(key=args[0], note="on_success"))
        self.db.flush()
        raise Boom("in a hook, on purpose")


@app.task(base=FailingHook, bind=True)
def hook_fails(self: Any, key: str) -> str:
    self.db.add(Row(key=key, note="body"))
    return "done"
