"""Workers that are killed at named points and at random moments, everywhere; then everything is sent again."""

import os
from pathlib import Path
from typing import Any

import pytest
from support import databases, servers
from support.once_storm import Storm
from support.storm_verdict import Setup, Verdict
from support.worker import Site

FULL = os.environ.get("CELERY_ALCHEMY_FAULTS") == "full"
KILLS = int(os.environ.get("EXACTLY_ONCE_KILLS", "200" if FULL else "25"))
SETUPS = (
    Setup("ours", "redis", "postgresql", "prefork"),
    Setup("ours", "rabbitmq", "mariadb", "threads"),
    Setup("ours", "redis", "mariadb", "gevent"),
    Setup("ours", "rabbitmq", "postgresql", "asyncio", "redis", "async def", "along"),
    Setup("ours, last", "rabbitmq", "mariadb", "prefork", "alchemy", "async def"),
    Setup("ours, last", "rabbitmq", "postgresql", "prefork"),
    Setup("ours", "redis", "postgresql", "prefork", "alchemy"),
)


def storm(request: pytest.FixtureRequest, site: Site, folder: Path, setup: Setup) -> Verdict:
    fixture = "run_database" if setup.database == "postgresql" else "mariadb"
    database: databases.Database = request.getfixturevalue(fixture)
    places = {"redis": site.urls.client, setup.database: database.url("storm")}
    if setup.broker == "rabbitmq":
        places["rabbitmq"] = servers.rabbitmq()
    verdict = Storm(setup, places, folder, seed=KILLS).run(KILLS, within_s=20 * KILLS)
    print(f"\n{verdict}")
    assert verdict.kills.total() >= KILLS
    assert verdict.settled
    return verdict


@pytest.mark.timeout(300 + 20 * KILLS)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_each_effect_once(request: pytest.FixtureRequest, site: Site, tmp_path: Path, setup: Setup) -> None:
    """Nothing is done twice or lost, but what kombu loses on Redis; nor that, once all is sent again with its ids."""
    verdict = storm(request, site, tmp_path / "storm", setup)
    assert verdict.again
    never: dict[str, Any] = dict.fromkeys(
        ("twice", "lost", "bodies_twice", "wrong_results", "failures", "set_aside", "twice_after", "lost_after"), 0
    )
    assert {name: getattr(verdict, name) for name in never} == never, verdict.odd
    assert any("random" in one for one in verdict.kills)
    assert any("point" in one for one in verdict.kills)
    if setup.broker == "rabbitmq":
        assert verdict.lost_by_kombu == 0


@pytest.mark.timeout(300 + 20 * KILLS)
def test_the_storm_shows_what_is_done_twice(request: pytest.FixtureRequest, site: Site, tmp_path: Path) -> None:
    """The same storm finds the effects that a task without exactly_once has twice."""
    setup = Setup("with Session(engine)", "redis", "postgresql", "threads")
    assert storm(request, site, tmp_path / "storm", setup).twice > 0
