"""What `alchemy_begin_with_first_statement` saves, over a network that delays each round trip by so much.

    python -m celery_alchemy.loadtests.overhead.first_statement --delay 1 --delay 20

Each task, by hand and with the layer, each with BEGIN by itself and with BEGIN along with the first statement, runs in
turn with the others, once each, in one process. A round is a number of turns; it compares the medians of its times as
ratios. The delay is that of a proxy in a process of its own; round trips are counted by another proxy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import click
from rich.console import Console
from sqlalchemy import URL, make_url

from ..services.proxy import CountingProxy, distant
from .counts import ROW
from .processes import database
from .rows import BY_HAND, SIDES, WITH_LAYER, make_side
from .tables import PACKAGES, hardware, median_interval, print_table

WARM_UP_TASKS = 30
ARMS = tuple(f"{side}{along}" for side in SIDES for along in ("", ", BEGIN along"))
TASKS = ("one INSERT", "ten statements")
Runs = dict[str, dict[str, Callable[[], object]]]


@dataclass(slots=True)
class Outcome:
    """What was measured of one task, by arm."""

    times_ms: dict[str, list[float]] = field(default_factory=lambda: {arm: [] for arm in ARMS})
    """Milliseconds per task, the median of each round."""
    round_trips: dict[str, int] = field(default_factory=dict)

    def ratios(self, arm: str) -> list[float]:
        """Return the times of `arm` as parts of those by hand, round by round, sorted."""
        return sorted(a / b for a, b in zip(self.times_ms[arm], self.times_ms["by hand"], strict=True))


@contextmanager
def tasks_on(url: URL) -> Iterator[Runs]:
    """Give what runs each task once, by task and arm."""
    address = url.render_as_string(hide_password=False)
    runs: Runs = {name: {} for name in TASKS}
    with ExitStack() as stack:
        for arm in ARMS:
            side = make_side(BY_HAND if arm.startswith(BY_HAND) else WITH_LAYER, address, "auto", arm.endswith("along"))
            stack.callback(side.close)
            side.app.WorkController(pool="solo", concurrency=1)
            for name in TASKS:
                runs[name][arm] = side.tasks[ROW[name].by_hand]
        yield runs


def measure(near: URL, delay_s: float, rounds: int, turns: int) -> dict[str, Outcome]:
    """Time all arms in turn, and count their round trips.

    Returns:
        By name of the task.
    """
    outcomes = {name: Outcome() for name in TASKS}
    with CountingProxy(near) as proxy, tasks_on(proxy.url) as runs:
        for name, arms in runs.items():
            _round(arms, WARM_UP_TASKS)
            for arm, run in arms.items():
                before = proxy.round_trips
                run()
                outcomes[name].round_trips[arm] = proxy.round_trips - before
    with ExitStack() as stack:
        url = stack.enter_context(distant(near, delay_s)) if delay_s else near
        runs = stack.enter_context(tasks_on(url))
        for name, arms in runs.items():
            _round(arms, WARM_UP_TASKS)
            for _ in range(rounds):
                for arm, median_ms in _round(arms, turns).items():
                    outcomes[name].times_ms[arm].append(median_ms)
    return outcomes


def _round(arms: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Return the median time of each arm in milliseconds; the order is reversed every turn."""
    times_ms: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(turns):
        for arm in ARMS if number % 2 else reversed(ARMS):
            began = time.perf_counter()
            arms[arm]()
            times_ms[arm].append((time.perf_counter() - began) * 1000)
    return {arm: statistics.median(times) for arm, times in times_ms.items()}


@click.command(help=__doc__)
@click.option("--delay", "delays", default=(0.0, 1.0), multiple=True, show_default=True, help="Of a round trip, in ms.")
@click.option("--driver", "drivers", default=("psycopg", "psycopg2"), multiple=True, show_default=True)
@click.option("--rounds", default=40, show_default=True, type=click.IntRange(6), help="Rounds per task and delay.")
@click.option("--turns", default=20, show_default=True, type=click.IntRange(1), help="Tasks per arm and round.")
def main(delays: tuple[float, ...], drivers: tuple[str, ...], rounds: int, turns: int) -> None:
    """Run the rounds and print the table."""
    lines = []
    with database() as address:
        for driver in drivers:
            for delay in delays:
                url = make_url(address).set(drivername=f"postgresql+{driver}")
                for name, outcome in measure(url, delay / 1000, rounds, turns).items():
                    for arm in ARMS:
                        first = [driver, f"{delay:g}", name, arm]
                        lines.append([*first, *_cells(outcome, arm), f"{rounds} x {turns}"])
    console = Console(width=150)
    headings = ["driver", "delay ms", "task", "arm", "round trips", "ms", "/ by hand", "95 %", "quartiles", "n"]
    title = "BEGIN along with the first statement: time per task, wall-clock, interleaved"
    print_table(console, title, headings, lines)
    console.print(hardware((*PACKAGES, "psycopg2-binary")))


def _cells(outcome: Outcome, arm: str) -> list[str]:
    ratios = outcome.ratios(arm)
    low, high = median_interval(ratios)
    quartiles = statistics.quantiles(ratios, n=4)
    return [
        str(outcome.round_trips[arm]),
        f"{statistics.median(outcome.times_ms[arm]):.2f}",
        f"{statistics.median(ratios):.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{quartiles[0]:.3f} to {quartiles[2]:.3f}",
    ]


if __name__ == "__main__":
    main()
