"""Workers that are killed at random moments and at random points, everywhere; then everything is sent again."""

import os
from pathlib import Path
from typing import Any

import pytest
from support import databases, preloaded, servers
from support.once_storm import Storm
from support.storm_verdict import Setup
from support.worker import Site

FULL = os.environ.get("CELERY_ALCHEMY_FAULTS") == "full"
KILLS = int(os.environ.get("EXACTLY_ONCE_KILLS", "200" if FULL else "25"))
SETUPS = (
    Setup("ours", "redis", "postgresql", "prefork"),
    Setup("ours", "rabbitmq", "mariadb", "threads"),
    Setup("ours", "redis", "mariadb", "gevent"),
    Setup("ours", "rabbitmq", "postgresql", "asyncio"),
    Setup("ours, last", "rabbitmq", "postgresql", "prefork"),
    Setup("ours", "redis", "postgresql", "prefork", "alchemy"),
)


@pytest.mark.timeout(300 + 20 * KILLS)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_each_effect_once(request: pytest.FixtureRequest, site: Site, tmp_path: Path, setup: Setup) -> None:
    """Nothing is done twice or lost, but what kombu loses on Redis; nor that, once all is sent again with its ids."""
    fixture = "run_database" if setup.database == "postgresql" else "mariadb"
    database: databases.Database = request.getfixturevalue(fixture)
    places = {"redis": site.urls.client, setup.database: database.url("storm")}
    if setup.broker == "rabbitmq":
        places["rabbitmq"] = servers.rabbitmq()
    try:
        verdict = Storm(setup, places, tmp_path / "storm", seed=KILLS).run(KILLS, within_s=20 * KILLS)
    finally:
        preloaded.close()
    print(f"\n{verdict}")
    assert verdict.kills.total() >= KILLS
    assert verdict.again
    never: dict[str, Any] = dict.fromkeys(
        ("twice", "lost", "bodies_twice", "wrong_results", "failures", "twice_after", "lost_after"), 0
    )
    assert {name: getattr(verdict, name) for name in never} == never, verdict.odd
    if setup.broker == "rabbitmq":
        assert verdict.lost_by_kombu == 0
