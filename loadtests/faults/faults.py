"""The faults: what happens, to which worker pools, and which tasks it may cost."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..tasks.patterns import POOLS
from .place import Place
from .tasks import IGNORE, MANY, RETRY, SURELY, WRITE

SLEEP_MS = 700
GONE_S = 1.5
LONGEST_MS = 60_000
LIMITED = 60


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong."""

    name: str
    summary: str  # One sentence for people
    cause: Callable[[Place, random.Random], object]
    pools: tuple[str, ...] = POOLS
    in_main: bool = False  # The main process uses the database before it forks


def _nothing(place: Place, chance: random.Random) -> None:
    place.run_all(WRITE, 6 * place.together, 20)


def _ignored(place: Place, chance: random.Random) -> None:
    place.run_all(IGNORE, 12, silent=True)
    place.run_all(WRITE, 2 * place.together)


def _idle(place: Place, chance: random.Random) -> None:
    place.run_all(WRITE, 2 * place.together, 50)
    place.terminate()
    place.run_all(WRITE, 2 * place.together, 20)


def _while_busy(strike: Callable[[Place], object]) -> Callable[[Place, random.Random], None]:
    """Return a cause that strikes while every slot is in a statement, and as many tasks wait behind."""

    def cause(place: Place, chance: random.Random) -> None:
        struck = place.send(WRITE, place.together, SLEEP_MS, expected=False)
        waiting = place.send(WRITE, place.together, 20)
        place.until_asleep(place.together)
        strike(place)
        place.wait([*struck, *waiting])

    return cause


def _gone(place: Place, chance: random.Random) -> None:
    tasks = place.send(SURELY, place.together, SLEEP_MS)
    place.until_asleep(place.together)
    place.proxy.refuse()
    place.proxy.cut()
    tasks += place.send(SURELY, place.together)
    time.sleep(GONE_S)
    place.proxy.recover()
    place.wait(tasks)


def _limits(place: Place, chance: random.Random) -> None:
    limits = [chance.uniform(0.002, 0.05) for _ in range(LIMITED)]
    place.run_all(MANY, LIMITED, expected=False, limits=limits)


def _killed(place: Place, chance: random.Random) -> None:
    by_limit: dict[str, Any] = {} if place.pool == "prefork" else {"time_limit": 0.7}
    struck = place.send(WRITE, place.together, LONGEST_MS, expected=False, **by_limit)
    if not by_limit:
        place.until_asleep(place.together)
        place.kill_pool_processes()
    place.wait(struck)


FAULTS: dict[str, Fault] = {
    fault.name: fault
    for fault in (
        Fault("nothing", "Nothing goes wrong; several tasks run at one time.", _nothing),
        Fault("forked", "The main process has used the database before it forked.", _nothing, ("prefork",), True),
        Fault("retries", "Each task retries twice after it has written.", lambda place, _: place.run_all(RETRY, 24)),
        Fault("ignored", "Tasks raise Ignore after they have written; others follow.", _ignored),
        Fault("limits", f"Soft time limits strike {LIMITED} tasks at random moments.", _limits, ("prefork",)),
        Fault(
            "killed",
            "Tasks are killed in the middle of a query: SIGKILL of the pool process, or gevent's hard time limit.",
            _killed,
            ("prefork", "gevent"),
        ),
        Fault("idle", "The server ends all idle connections.", _idle),
        Fault("busy", "The server ends all connections while tasks are in a statement.", _while_busy(Place.terminate)),
        Fault(
            "cut",
            "The network resets all connections while tasks are in a statement.",
            _while_busy(lambda place: place.proxy.cut()),
        ),
        Fault("gone", f"The server is gone for {GONE_S} s; tasks are retried on OperationalError.", _gone),
    )
}
