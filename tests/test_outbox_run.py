"""`celery alchemy outbox run` as a process: what ends it, what wakes it, what it tells."""

import contextlib
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from sqlalchemy import URL
from support.databases import PostgreSQL
from support.waiting import eventually
from support.worker import Site, start_process

from celery_alchemy.loadtests.services.processes import Process
from celery_alchemy.loadtests.services.proxy import Proxy
from celery_alchemy.strategies.features import outbox
from celery_alchemy.strategies.watching.open_telemetry import OpenTelemetryObserver
from celery_alchemy.workers.sending.publication import Publication

NOBODY_WAITS_SO_LONG_S = "3600"


class Shop:
    """An app in a folder of its own, its outbox filled by hand, and `celery alchemy outbox run` for it."""

    def __init__(self, folder: Path, database: PostgreSQL, site: Site, key: str) -> None:
        self.folder, self.database, self.site = folder, database, site
        self.queue = f"{site.prefix}{key}"
        self.table = outbox.chosen_table("celery_alchemy_outbox")
        database.execute("DELETE FROM celery_alchemy_outbox")
        self.url = database.url("outbox-run")
        self._patches_itself = False
        self.write_app(site.urls.celery)

    def write_app(self, broker: str, first: str = "", **settings: Any) -> None:
        self._patches_itself = bool(first)
        (self.folder / "shop.py").write_text(
            f"{first}\nfrom celery import Celery\nfrom celery_alchemy import Alchemy\n"
            f"app = Celery('shop', broker={broker!r})\n"
            f"app.conf.update(alchemy_database_url={self.url!r}, alchemy_outbox=True, "
            f"task_default_queue={self.queue!r}, **{settings!r})\n"
            "db = Alchemy(app)\n"
        )

    def write(self, *names: str, notify: bool = False) -> None:
        """Put messages into the outbox, as a transaction would."""
        messages = []
        for name in names:
            headers = {"id": name, "task": "note", "lang": "py", "root_id": name, "parent_id": None, "group": None}
            publication = Publication(
                b"[[], {}, {}]", "application/json", "utf-8", headers, {"correlation_id": name}, "", self.queue
            )
            messages.append(outbox.Message(name, "note", publication.to_text("note")))
        with self.database.engine.connect() as connection:
            outbox.write(connection, self.table, messages, lease_s=0, notify=notify)

    def waiting(self) -> int:
        return int(self.database.column("SELECT count(*) FROM celery_alchemy_outbox")[0])

    def sent(self) -> list[str]:
        messages = map(json.loads, reversed(self.site.redis.lrange(self.queue, 0, -1)))
        return [message["headers"]["id"] for message in messages]

    @contextlib.contextmanager
    def running(self, *arguments: str, under: Sequence[str] = ()) -> Iterator[Process]:
        """Run it for the time of the block; `under` is a command that ends in executing its arguments."""
        command = [*under, sys.executable, "-m", "celery", "-A", "shop", "alchemy", "outbox", "run", *arguments]
        process = start_process(command, self.folder / "log", {}, own=bool(under) or self._patches_itself)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(10)

    def log(self) -> str:
        return (self.folder / "log").read_text()


@pytest.fixture
def shop(tmp_path: Path, run_database: PostgreSQL, site: Site, key: str) -> Iterator[Shop]:
    shop = Shop(tmp_path, run_database, site, key)
    yield shop
    site.redis.delete(shop.queue)
    run_database.execute("DELETE FROM celery_alchemy_outbox")


IN_THE_BACKGROUND = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")
"""As a shell does with what it puts into the background: interrupts are ignored."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", ["foreground", "background"])
def test_a_signal_ends_it_and_nothing_is_sent_twice(shop: Shop, number: int, where: str) -> None:
    """In the middle of many messages: those that were sent are not in the table any more."""
    names = [f"m{number}" for number in range(2000)]
    for start in range(0, 2000, 20):
        shop.write(*names[start : start + 20])
    with shop.running(under=IN_THE_BACKGROUND if where == "background" else ()) as process:
        eventually(lambda: len(shop.sent()) > 50, "it sends")
        process.send_signal(number)
        assert process.wait(30) == 0, shop.log()
    sent = shop.sent()
    assert len(sent) < len(names), "the signal came too late to show anything"
    assert shop.waiting() == len(names) - len(sent)
    with shop.running("--once") as process:
        assert process.wait(60) == 0, shop.log()
    assert sorted(shop.sent()) == sorted(names)


def test_an_idle_one_ends_at_once(shop: Shop) -> None:
    with shop.running("--interval-s", NOBODY_WAITS_SO_LONG_S) as process:
        eventually(lambda: listens(shop.database), "it listens")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, shop.log()
    assert shop.database.connections("outbox-run") == []


def listens(database: PostgreSQL) -> bool:
    """Whether it has nothing to send, and waits."""
    return any("LISTEN" in one.query for one in database.connections("outbox-run"))


def test_what_is_committed_wakes_it(shop: Shop) -> None:
    with shop.running("--interval-s", NOBODY_WAITS_SO_LONG_S):
        eventually(lambda: listens(shop.database), "it listens")
        shop.write("a", "b", notify=True)
        eventually(lambda: shop.sent() == ["a", "b"], "they are sent")
        eventually(lambda: shop.waiting() == 0, "their rows are gone")
        idle = lambda: {one.state for one in shop.database.connections("outbox-run")} == {"idle"}  # noqa: E731
        eventually(idle, "it holds no transaction")


def test_without_a_notification_it_looks_again(shop: Shop) -> None:
    with shop.running("--interval-s", "0.1"):
        eventually(lambda: listens(shop.database), "it listens")
        shop.write("a")
        eventually(lambda: shop.sent() == ["a"], "it is sent")


def test_a_second_signal_ends_it_while_the_broker_is_stalled(shop: Shop) -> None:
    with proxy_of(shop) as proxy:
        shop.write_app(f"redis://127.0.0.1:{proxy.port}/0")
        proxy.fall_silent()
        shop.write("a")
        with shop.running() as process:
            eventually(lambda: shop.database.column("SELECT due_at FROM celery_alchemy_outbox"), "it is there")
            due = "SELECT count(*) FROM celery_alchemy_outbox WHERE due_at > extract(epoch FROM statement_timestamp())"
            eventually(lambda: shop.database.column(due) == [1], "it is claimed")
            assert [c.state for c in shop.database.connections("outbox-run") if "transaction" in c.state] == []
            process.send_signal(signal.SIGTERM)
            eventually(lambda: process.poll() is not None or process.send_signal(signal.SIGTERM), "it ends")
            assert process.poll() in {128 + signal.SIGTERM, -signal.SIGTERM}, shop.log()


@contextlib.contextmanager
def proxy_of(shop: Shop) -> Iterator[Proxy]:
    """Yield a way to the broker that may fall silent."""
    socket = shop.site.urls.celery.partition("://")[2].partition("?")[0]
    embedded = shop.site.urls.celery.startswith("redis+socket")
    place = URL.create("redis", host="127.0.0.1", port=6379, query={"unix_socket": socket} if embedded else {})
    with contextlib.closing(Proxy(place)) as proxy:
        yield proxy


def test_a_broker_that_stands_still_and_goes_on(shop: Shop) -> None:
    """Redis takes connections and answers nothing, in the middle of messages too: they wait, and none is lost."""
    with proxy_of(shop) as proxy:
        stalls = {"socket_timeout": 0.3, "socket_connect_timeout": 0.3}
        shop.write_app(f"redis://127.0.0.1:{proxy.port}/0", broker_transport_options=stalls)
        shop.write("a")
        with shop.running("--interval-s", "0.1") as process:
            eventually(lambda: shop.sent() == ["a"], "it is sent")
            proxy.fall_silent()
            shop.write("b", "c")
            eventually(lambda: "does not answer" in shop.log(), "it has tried")
            assert [c.state for c in shop.database.connections("outbox-run") if "transaction" in c.state] == []
            assert shop.waiting() >= 2
            proxy.recover()
            eventually(lambda: {"b", "c"} <= set(shop.sent()), "they are sent", within_s=60)
            eventually(lambda: shop.waiting() == 0, "their rows are gone")
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0, shop.log()


GREEN = {
    "eventlet": "import eventlet\neventlet.monkey_patch()",
    "gevent": "from gevent import monkey\nmonkey.patch_all()",
}


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@pytest.mark.parametrize("library", GREEN)
def test_where_the_app_is_patched(shop: Shop, library: str, driver: str) -> None:
    """A module that is written for a worker with greenlets is the app of a sender too."""
    shop.url = shop.database.url("outbox-run", driver)
    shop.write_app(shop.site.urls.celery, GREEN[library])
    with shop.running("--interval-s", NOBODY_WAITS_SO_LONG_S) as process:
        eventually(lambda: listens(shop.database), "it listens")
        shop.write("a", "b", notify=True)
        eventually(lambda: shop.sent() == ["a", "b"], "they are sent")
        eventually(lambda: shop.waiting() == 0, "their rows are gone")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, shop.log()
    with shop.running("--once") as process:
        shop.write("c")
        assert process.wait(60) == 0, shop.log()


def test_it_tells_metrics_what_is_in_the_outbox(shop: Shop) -> None:
    (shop.folder / "watching.py").write_text(
        "class Observer:\n"
        "    def unit_ended(self, unit, duration_s): pass\n"
        "    def waited(self, database, wait_s): pass\n"
        "    def leaked(self, count): pass\n"
        "    def outbox(self, *what): print('told', *what, flush=True)\n"
    )
    shop.write_app(shop.site.urls.celery, alchemy_metrics="watching:Observer")
    shop.write("a", "b", "c")
    shop.database.execute("UPDATE celery_alchemy_outbox SET due_at = NULL WHERE task_id = 'c'")
    with shop.running():
        eventually(lambda: "told" in shop.log(), "it tells")
    told = next(line.split() for line in shop.log().splitlines() if line.startswith("told"))
    assert told[1:3] == ["2", "1"]
    assert float(told[3]) >= 0


def test_opentelemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    from opentelemetry import metrics

    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    monkeypatch.setattr(metrics, "get_meter", provider.get_meter)
    counted = {"sent": 3, "failed": 1}
    observer = OpenTelemetryObserver(lambda: (), counted.items)
    assert "celery_alchemy.outbox.waiting" not in collected(reader), "nothing is known yet"
    observer.outbox(5, 2, 61.5)
    found = collected(reader)
    assert found["celery_alchemy.outbox.waiting"] == {"": 5}
    assert found["celery_alchemy.outbox.set_aside"] == {"": 2}
    assert found["celery_alchemy.outbox.oldest"] == {"": 61.5}
    assert found["celery_alchemy.outbox.messages"] == {"sent": 3, "failed": 1}
    provider.shutdown()


def collected(reader: InMemoryMetricReader) -> dict[str, dict[str, float]]:
    data = reader.get_metrics_data()
    every = data.resource_metrics if data is not None else []
    return {
        metric.name: {str(dict(p.attributes).get("outcome", "")): p.value for p in metric.data.data_points}
        for resource in every
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.data.data_points and hasattr(metric.data.data_points[0], "value")
    }
