"""`async def` tasks that meet interruptions anywhere in their life."""

import asyncio
import time
from typing import Any

from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import text

from celery_alchemy import AsyncDatabaseTask
from support.project.app import app, db
from support.project.models import Row

ROWS = 8
"""What a task has written that has succeeded."""


def nap() -> Any:
    """Return a statement that takes a few milliseconds on the server."""
    sql = {"postgresql": "SELECT pg_sleep(0.004)", "mysql": "SELECT SLEEP(0.004)"}
    return text(sql.get(db.async_engine.dialect.name, "SELECT 1"))


@app.task(base=AsyncDatabaseTask, bind=True)
async def live(self: AsyncDatabaseTask, key: str, note: str, slow_commit: bool) -> float:
    """Wait for a connection, execute, flush, nest, pause; the COMMIT takes its time where it can. Tell how long it
    took."""
    phase, began = "before", time.monotonic()
    try:
        await asyncio.sleep(0.001)
        phase = "connecting"
        await self.db.execute(text("SELECT 1"))
        phase = "statement"
        self.db.add(Row(key=key, note=note))
        await self.db.execute(nap())
        phase = "flush"
        self.db.add_all(Row(key=key, note=note) for _ in range(ROWS - 3))
        await self.db.flush()
        phase = "pause"
        await asyncio.sleep(0.002)
        phase = "savepoint"
        async with self.db.begin_nested():
            self.db.add(Row(key=key, note=note))
        if slow_commit:
            await self.db.execute(text("INSERT INTO slow_ (key_) VALUES (:note)"), {"note": f"storm {note}"})
        phase = "last flush"
        self.db.add(Row(key=key, note=note))
        return time.monotonic() - began
    except SoftTimeLimitExceeded as limit:
        limit.args = (phase,)
        raise
