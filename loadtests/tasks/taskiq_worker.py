"""A worker of another framework: taskiq with SQLAlchemy's AsyncSession, as their documentations have it.

It takes its tasks from the same queue, in Celery's own messages, and answers like the others, so that load generator
and checks are the same. One process runs up to `--max-async-tasks` tasks on one event loop.

Sources: taskiq, "Taskiq dependencies" and "State and events"; SQLAlchemy, "Asynchronous I/O".
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Annotated, Any

from celery.exceptions import Retry
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session
from taskiq import BrokerMessage, Context, TaskiqDepends, TaskiqEvents, TaskiqMessage, TaskiqState
from taskiq.abc.formatter import TaskiqFormatter
from taskiq.exceptions import NoResultError
from taskiq_redis import ListQueueBroker

from ..reporting import Replies, announce
from ..services.environment import WorkerEnvironment
from . import observation, phases
from .patterns import DEFAULT_CONNECTIONS, PATTERNS
from .replies import Outcome, redis_url
from .workloads import PREFLIGHT, WORKLOADS, Workload


class CeleryFormatter(TaskiqFormatter):
    """Reads and writes the messages of Celery's protocol 2 as kombu puts them into a Redis list."""

    def loads(self, message: bytes) -> TaskiqMessage:
        envelope: dict[str, Any] = json.loads(message)
        args, kwargs, _ = json.loads(base64.b64decode(envelope["body"]))
        headers = envelope["headers"]
        return TaskiqMessage(
            task_id=headers["id"], task_name=headers["task"], labels={"headers": headers}, args=args, kwargs=kwargs
        )

    def dumps(self, message: TaskiqMessage) -> BrokerMessage:
        body = base64.b64encode(json.dumps([message.args, message.kwargs, {}]).encode()).decode()
        envelope = json.dumps({"body": body, "headers": message.labels["headers"]})
        return BrokerMessage(task_id=message.task_id, task_name=message.task_name, message=envelope.encode(), labels={})


environment: WorkerEnvironment = WorkerEnvironment.from_environ()
assert redis_url(environment.broker_url), "taskiq takes Celery's messages from a list of Redis or Valkey only"
broker: Any = ListQueueBroker(environment.reply_url, queue_name=environment.queue).with_formatter(CeleryFormatter())
replies: Replies = Replies(environment.reply_url, environment.reply_key)


@broker.on_event(TaskiqEvents.WORKER_STARTUP)
async def start(state: TaskiqState) -> None:
    """Make the Engine of this process, and tell that it consumes."""
    engine = create_async_engine(environment.database_url)
    phases.instrument(engine.sync_engine)
    state.make_session = async_sessionmaker(engine, expire_on_commit=False)
    announce(environment.reply_url, environment.ready_key, pid=os.getppid(), max_connections=DEFAULT_CONNECTIONS)


async def session_of(context: Annotated[Context, TaskiqDepends()]) -> AsyncIterator[AsyncSession]:
    """Yield the AsyncSession of one task."""
    async with context.state.make_session() as session:
        yield session


def _define(workload: Workload) -> None:
    @broker.task(task_name=workload.task_name)
    async def task(
        number: int,
        context: Annotated[Context, TaskiqDepends()],
        session: Annotated[AsyncSession, TaskiqDepends(session_of)],
    ) -> None:
        message = context.message
        headers = message.labels["headers"]
        request = SimpleNamespace(
            id=message.task_id, retries=headers.get("retries") or 0, loadtest=phases.begin(),
            loadtest_reply=headers.get("loadtest_reply"),
        )  # fmt: skip

        def work(of_task: Session) -> None:
            observation.run(workload, SimpleNamespace(retry=_retry), request, number, of_task)

        try:
            await session.run_sync(work)
            await session.commit()
        except Retry as error:
            await session.rollback()
            replies.answer(request, request.id, Outcome.RETRY, error)
            headers["retries"] = request.retries + 1
            await broker.kick(broker.formatter.dumps(message))
            raise NoResultError from error
        except Exception as error:
            await session.rollback()
            replies.answer(request, request.id, Outcome.FAILURE, error)
            raise
        replies.answer(request, request.id, Outcome.SUCCESS)


def _retry(countdown: float = 0) -> Retry:
    return Retry("again", when=countdown)


for _workload in (*WORKLOADS.values(), PREFLIGHT):
    if _workload.name not in PATTERNS[environment.pattern].without:
        _define(_workload)
