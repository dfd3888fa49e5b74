"""One service layer for FastAPI's endpoints and `async def` tasks: the code of fastapi.md, over ASGI."""

import asyncio
from typing import Any

import httpx2
from sqlalchemy import make_url
from support.databases import PostgreSQL
from support.docs import DOCS, blocks

from celery_alchemy.strategies.asynchronous import loop_thread

TITLE = "\n## One service layer for endpoints and `async def` tasks\n"
URL = "postgresql+psycopg://localhost/bank"


def test_endpoints_and_tasks_share_a_service(run_database: PostgreSQL, key: str) -> None:
    section = (DOCS / "fastapi.md").read_text().partition(TITLE)[2].partition("\n## ")[0]
    code = "\n".join(blocks(section, "python"))
    assert URL in code
    url = make_url(run_database.url("fastapi-services")).render_as_string(hide_password=False)
    page: dict[str, Any] = {"__name__": "bank"}
    exec(compile(code.replace(URL, url).replace("redis://localhost", "memory://"), "bank", "exec", 0, True), page)
    sent: list[Any] = []
    page["app"].conf.task_always_eager = False
    run_database.execute("CREATE TABLE IF NOT EXISTS accounts (name text PRIMARY KEY, balance integer NOT NULL)")

    def balance() -> list[Any]:
        return run_database.column("SELECT balance FROM accounts WHERE name = :key", key=key)

    def send(name: str, args: Any = None, kwargs: Any = None, **_: Any) -> None:
        sent.append((name, tuple(args or ()), balance()))

    async def requests() -> list[int]:
        transport = httpx2.ASGITransport(app=page["api"])
        async with httpx2.AsyncClient(transport=transport, base_url="http://bank") as client:
            answers = [await client.post(f"/accounts/{key}/{amount}") for amount in (10, 2000, 20)]
            await page["db"].async_engine.dispose()
            return [answer.status_code for answer in answers]

    page["app"].amqp.send_task_message = lambda producer, name, message, **options: send(name, message.body[0])
    assert asyncio.run(requests()) == [200, 400, 200]
    assert sent == [(page["add_bonus"].name, (key,), [10]), (page["add_bonus"].name, (key,), [30])]
    assert page["add_bonus"].apply((key,), throw=True).result == 35
    assert balance() == [35]
    page["db"].stop()
    loop_thread.stop()
