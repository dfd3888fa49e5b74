"""Workers that are killed at named points: each effect once, links included, whatever is sent again."""

import os

import pytest
from support import databases, servers
from support.once_kills import EXPECTED, POINTS, Kills, count
from support.worker import Site

MODE = os.environ.get("EXACTLY_ONCE_MODE", "first")
""""plain" counts what becomes of the same tasks without it."""
ROUNDS = int(os.environ.get("EXACTLY_ONCE_ROUNDS", "1"))
SETUPS = {
    "redis-postgresql-prefork": ("redis", "run_database", "prefork"),
    "rabbitmq-mariadb-prefork": ("rabbitmq", "mariadb", "prefork"),
    "redis-mariadb-threads": ("redis", "mariadb", "threads"),
    "redis-postgresql-prefork-own results": ("redis", "run_database", "prefork"),
    "rabbitmq-postgresql-solo": ("rabbitmq", "run_database", "solo"),
}
LONG = {"redis-mariadb-threads", "rabbitmq-postgresql-solo"}
"""A worker that is one process starts anew after each kill: `make test-faults` has the time for it."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "setup", [name for name in SETUPS if name not in LONG or os.environ.get("CELERY_ALCHEMY_FAULTS") == "full"]
)
def test_each_effect_once(request: pytest.FixtureRequest, site: Site, setup: str) -> None:
    broker, database_name, pool = SETUPS[setup]
    database: databases.Database = request.getfixturevalue(database_name)
    own: dict[str, object] = {
        "result_backend": "alchemy://",
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
    }
    kills = Kills(
        site,
        database,
        pool,
        servers.rabbitmq() if broker == "rabbitmq" else "",
        alchemy_exactly_once=False if MODE == "plain" else MODE,
        alchemy_outbox=True,
        **own if setup.endswith("own results") else {},
    )
    keys: dict[str, str] = {}
    unfinished = []
    try:
        kills.start()
        for _ in range(ROUNDS):
            for point in POINTS:
                for kind in EXPECTED:
                    if "count" in point and kind != "chord":
                        continue
                    key, done = kills.run(kind, point)
                    keys[key] = kind
                    if not done:
                        unfinished.append((kind, point))
        odd = kills.settle(keys)
        twice, lost = count(odd, keys)
        print(
            f"\n{setup}, {MODE}: {kills.killed()} kills, {len(keys)} flows, {twice} twice, {lost} lost, {unfinished=}"
        )
        if MODE != "plain":
            assert odd == {}, kills.tail()
            assert kills.failures() == []
        assert kills.killed() >= len(POINTS)
    finally:
        kills.stop()
