"""What `alchemy_begin_with_first_statement` saves, over a network that delays each round trip by so much.

    python -m celery_alchemy.loadtests.overhead.first_statement --delay 1 --delay 20

Each task, by hand and with the layer, each with BEGIN by itself and with BEGIN along with the first statement, runs in
turn with the others, once each, in one process. A round is a number of turns; it compares the medians of its times as
ratios. The delay is that of a proxy in a process of its own; round trips are counted by another proxy.
"""

from __future__ import annotations

import statistics
from contextlib import nullcontext
from typing import TypeVar

import click
from rich.console import Console
from sqlalchemy import URL, make_url

from ..services.proxy import CountingProxy, distant
from . import child
from .processes import database, started
from .rows import ALONG, BY_HAND, SIDES
from .tables import PACKAGES, hardware, median_interval, print_table

WARM_UP_TASKS = 30
ARMS = tuple(f"{side}{along}" for side in SIDES for along in ("", ALONG))
TASKS = {"one INSERT": "insert", "ten statements": "ten"}
T = TypeVar("T")
ByArm = dict[str, dict[str, T]]  # By task and arm


def count_round_trips(near: URL) -> ByArm[int]:
    """Count the round trips of each task."""
    counted: ByArm[int] = {name: {} for name in TASKS}
    with CountingProxy(near) as proxy, started("solo", "auto", _address(proxy.url), *ARMS) as process:
        for name, task in TASKS.items():
            process.ask(child.time_turns, task, WARM_UP_TASKS)
            for arm in ARMS:
                before = proxy.round_trips
                process.ask(child.repeat, arm, task, 1)
                counted[name][arm] = proxy.round_trips - before
    return counted


def time_rounds(near: URL, delay_s: float, rounds: int, turns: int) -> ByArm[list[float]]:
    """Time all arms in turn; return milliseconds per task, the median of each round."""
    times: ByArm[list[float]] = {name: {arm: [] for arm in ARMS} for name in TASKS}
    with (
        distant(near, delay_s) if delay_s else nullcontext(near) as url,
        started("solo", "auto", _address(url), *ARMS) as process,
    ):
        for name, task in TASKS.items():
            process.ask(child.time_turns, task, WARM_UP_TASKS)
            for _ in range(rounds):
                for arm, median_ms in process.ask(child.time_turns, task, turns).items():
                    times[name][arm].append(median_ms)
    return times


def _address(url: URL) -> str:
    return url.render_as_string(hide_password=False)


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
            url = make_url(address).set(drivername=f"postgresql+{driver}")
            round_trips = count_round_trips(url)
            for delay in delays:
                for name, times in time_rounds(url, delay / 1000, rounds, turns).items():
                    for arm in ARMS:
                        cells = _cells(times[arm], times[BY_HAND])
                        trips = str(round_trips[name][arm])
                        lines.append([driver, f"{delay:g}", name, arm, trips, *cells, f"{rounds} x {turns}"])
    console = Console(width=150)
    headings = ["driver", "delay ms", "task", "arm", "round trips", "ms", "/ by hand", "95 %", "quartiles", "n"]
    title = "BEGIN along with the first statement: time per task, wall-clock, interleaved"
    print_table(console, title, headings, lines)
    console.print(hardware((*PACKAGES, "psycopg2-binary")))


def _cells(times_ms: list[float], by_hand_ms: list[float]) -> list[str]:
    ratios = sorted(a / b for a, b in zip(times_ms, by_hand_ms, strict=True))
    low, high = median_interval(ratios)
    first, _, third = statistics.quantiles(ratios, n=4)
    times = f"{statistics.median(times_ms):.2f}", f"{statistics.median(ratios):.3f}"
    return [*times, f"{low:.3f} to {high:.3f}", f"{first:.3f} to {third:.3f}"]


if __name__ == "__main__":
    main()
