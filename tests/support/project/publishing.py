"""`async def` tasks that send, and ask, whatever Celery has for that."""

import asyncio
from typing import Any

from celery import chain, chord, group
from celery.result import AsyncResult, allow_join_result
from sqlalchemy import text

from celery_alchemy import AsyncDatabaseTask
from support.project.app import app, db
from support.project.models import Row


@app.task(base=AsyncDatabaseTask)
async def nothing(*_: Any) -> int:
    await asyncio.sleep(0)
    return 1


@app.task(base=AsyncDatabaseTask)
async def note_done(_: Any, key: str) -> None:
    db.async_session.add(Row(key=key, note="done"))


class Hooked(AsyncDatabaseTask):
    """Sends in its hooks too."""

    abstract = True

    def on_success(self, *_: Any) -> None:
        nothing.delay()

    def after_return(self, *_: Any) -> None:
        nothing.delay()


@app.task(base=Hooked, bind=True, max_retries=1)
async def publish(self: AsyncDatabaseTask, key: str, how: str) -> None:
    """Do one thing that asks the broker or the result backend, with a transaction open."""
    await self.db.execute(text("SELECT 1"))
    self.db.add(Row(key=key, note=how))
    await self.db.flush()
    if how == "delay":
        nothing.delay()
        nothing.apply_async(link=nothing.si(), link_error=nothing.si())
    elif how == "on commit":
        self.delay_on_commit(key, "delay")
        db.on_commit(nothing.delay)
        await self.db.commit()
    elif how == "canvas":
        chain(nothing.si(), nothing.si()).apply_async()
        group(nothing.si(), nothing.si()).apply_async()
        chord([nothing.si(), nothing.si()], nothing.si()).apply_async()
    elif how == "state":
        self.update_state(state="PROGRESS", meta={"done": 1})
        sent = nothing.delay()
        assert AsyncResult(sent.id, app=app).state in {"PENDING", "SUCCESS"}
        sent.forget()
    elif how == "join":
        with allow_join_result():
            nothing.delay()
    elif how == "control":
        app.control.revoke("nobody")
        app.control.broadcast("ping")
    elif how == "retry" and not self.request.retries:
        raise self.retry(countdown=0)
    elif how == "replace":
        raise self.replace(note_done.s(None, key))
    elif how == "fail":
        raise ValueError("so it is")


@app.task(base=AsyncDatabaseTask)
async def publish_in_child() -> None:
    """Publishes where nothing can wait for a thread: that is noted."""

    async def child() -> None:
        nothing.delay()

    await asyncio.create_task(child())
