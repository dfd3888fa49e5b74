"""Producers of the event loop: one that could not publish is not given to the next as it is."""

import asyncio
import threading
import uuid
from typing import Any

import pytest
from amqp.exceptions import NotFound
from celery import Celery
from support import servers

from celery_alchemy.strategies.asynchronous.hosting import Interruption, drive
from celery_alchemy.workers.asyncio_pool.offloading import OffloadedProducers, Offloads
from celery_alchemy.workers.asyncio_pool.starter import Starter
from celery_alchemy.workers.asyncio_pool.threads import Threads


def test_after_a_publish_that_has_failed_the_next_one_works() -> None:
    name = f"producers-{uuid.uuid4().hex}"
    app = Celery(broker=servers.rabbitmq(), broker_connection_retry=False)
    app.conf.update(broker_pool_limit=1, broker_transport_options={"confirm_publish": True})

    async def main() -> list[Any]:
        threads = Threads(Starter(), asyncio.get_running_loop(), "messages", 1, 1)
        producers = OffloadedProducers(app.amqp.producer_pool, threads)
        used: list[Any] = []

        def publish(exchange: str) -> None:
            with producers.acquire(block=True) as producer:
                used.append(producer.connection.connection)
                producer.publish("x", exchange=exchange, routing_key=name, retry=False)

        def in_a_request(exchange: str) -> Any:
            return drive(lambda: publish(exchange), Interruption(lambda seconds: asyncio.CancelledError()))

        await in_a_request("")
        with pytest.raises(NotFound):
            await in_a_request("nowhere")
        for _ in range(3):
            await asyncio.wait_for(in_a_request(""), 60)
        producers.close()
        return used

    with app.connection_for_write() as connection:
        with connection.SimpleQueue(name) as queue:
            used = asyncio.run(main())
            for _ in range(4):
                queue.get(timeout=60).ack()
        connection.default_channel.queue_delete(name)
    assert used[0] == used[1]
    assert used[1] not in used[2:], "the connection of the one that has failed was closed"
    app.close()


def test_the_queue_for_results_is_there_when_a_coroutine_has_sent() -> None:
    """A thread declares it, under the name that the message has; outside of a worker a task may wait for results."""
    name = f"results-{uuid.uuid4().hex}"
    app = Celery(broker=servers.rabbitmq(), backend="rpc://", set_as_current=False)
    declarers: list[str] = []
    prepare = app.backend.on_task_call

    def on_task_call(*args: Any) -> Any:
        declarers.append(threading.current_thread().name)
        return prepare(*args)

    app.backend.on_task_call = on_task_call

    async def main() -> str:
        starter, loop = Starter(), asyncio.get_running_loop()
        offloads = Offloads(app, *(Threads(starter, loop, of, 1, 1) for of in ("results", "messages")))

        def send() -> None:
            app.send_task("nothing", queue=name)

        await drive(send, Interruption(lambda seconds: asyncio.CancelledError()))
        offloads.undo()
        starter.close()
        return str(app.thread_oid)

    replies = asyncio.run(main())
    with app.connection_for_write() as connection:
        assert connection.default_channel.queue_declare(replies, passive=True).queue == replies
        for queue in (name, replies):
            connection.default_channel.queue_delete(queue)
    assert declarers == ["asyncio-pool-listening"]
    app.close()
