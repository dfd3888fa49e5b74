"""Which tests pytest-xdist keeps in one process: those that share a worker, or a module's fixtures; and which it starts
with: what takes longest, or one process still has it when the others have nothing left.

Its own marker does not do it: with pytest 9.2, pytest-xdist 3.8 sets an attribute that pytest no longer reads.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

_PAIR = re.compile(
    r"[\[-]((?:local|scoped|per_process|per_loop)-(?:prefork|threads|gevent|eventlet|solo|asyncio))[\]-]"
)

SLOW: dict[float, str] = {
    15: "test_servers_that_hang",
    8: "test_nothing_blocks",
    7: "test_stopping",
    6: "test_properties test_typing test_locust_users",
    4: "test_locust_run test_locust_generator test_storms test_lost_networks test_limits test_kills test_connections",
    3: "test_plugin test_ends test_bench_runs test_bench_numbers test_counts test_examples test_shutdowns",
    2: "test_outbox_senders test_outbox_servers test_isolation test_event_loops test_reset_workers",
    1: "test_outbox_sending test_again test_bench_page test_bench_report",
}
"""Modules by how long each of their tests takes on a quiet machine, about, in seconds."""
USUAL_S = 0.1
SECONDS_A_TEST = {module: seconds for seconds, modules in SLOW.items() for module in modules.split()}


def group_of(nodeid: str) -> str:
    """Return the pair of strategy and worker pool of a contract test, or the module of another test."""
    module = PurePosixPath(nodeid.partition("::")[0]).stem
    pair = _PAIR.search(nodeid) if module.startswith("test_contract_") else None
    return pair[1] if pair else module


def longest_first(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Return the tests in the order in which their groups are to start."""
    groups: defaultdict[str, float] = defaultdict(float)
    for item in items:
        groups[group_of(item.nodeid)] += SECONDS_A_TEST.get(item.path.stem, USUAL_S)
    return sorted(items, key=lambda item: -groups[group_of(item.nodeid)])


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Give each group to one process, in the order in which they were collected."""

    def __init__(self, config: pytest.Config, log: Any = None) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)
