"""How often a task waits for the database's answer: exact where rates are noisy, and what counts on a slow network.

One worker per pattern, running one task at a time, on a database of its own behind a proxy that counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ..services.harness import LoadWorker, Services, load_worker
from ..services.proxy import CountingProxy
from ..tasks.patterns import OURS, PATTERNS
from ..tasks.workloads import WORKLOADS

TASKS = 20
WARM_UP = 10
"""Tasks that are not counted: psycopg prepares a statement, in a round trip of its own, when it sends it again."""
QUIET_S = 0.3  # Some patterns end their Session after the task has answered


def measure(
    services: Services,
    patterns: Sequence[str] = tuple(PATTERNS),
    workloads: Sequence[str] = tuple(WORKLOADS),
    *,
    tasks: int = TASKS,
    strategy: str = "local",
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, dict[str, float]]:
    """Count round trips per task, connecting included where a pattern connects in each task.

    Args:
        tasks: How many to count, a multiple of ten for `mix`.
        strategy: Ours; the strategies send the same statements, as the tests check.
        patterns: Those that do not run under solo are left out.
        progress: Called with the name of each pattern before it is measured.
    Returns:
        By name of the workload, then of the pattern: round trips per task that was sent, to 0.01. Those of
        `mix` include its retries.
    Raises:
        WorkerError: A worker did not start, or a task failed.
    """
    counted: dict[str, dict[str, float]] = {name: {} for name in workloads}
    for pattern in patterns:
        if "solo" not in PATTERNS[pattern].pools:
            continue
        progress(pattern)
        chosen = strategy if pattern == OURS else None
        with load_worker(
            services, pool="solo", pattern=pattern, strategy=chosen, name=f"trips-{pattern}",
            proxied=CountingProxy, kind=LoadWorker,
        ) as worker:  # fmt: skip
            for name in workloads:
                worker.run(WORKLOADS[name], range(WARM_UP))
                before = _settled(worker.proxy)
                worker.run(WORKLOADS[name], range(tasks))
                counted[name][pattern] = round((_settled(worker.proxy) - before) / tasks, 2)
    return counted


def _settled(proxy: CountingProxy) -> int:
    """Return the count once it has stood still."""
    while True:
        seen = proxy.round_trips
        time.sleep(QUIET_S)
        if proxy.round_trips == seen:
            return seen
