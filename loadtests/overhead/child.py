"""The process that is measured: it acts as one worker pool, with one strategy, and runs tasks of one side or of both.

It runs them in one thread, with no broker behind it. Started by `processes.started`, for under gevent nothing may be
imported before the patch. What it is asked for is a function that takes the sides, and its other arguments. It ends
with its input, without a clean-up that would be counted.
"""

from __future__ import annotations

import gc
import os
import random
import select
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pkgutil import resolve_name
from types import FrameType
from typing import Any

from celery import signals

from ..client.lines import answer_lines
from .rows import BY_HAND, Side, make_side

WORKER_POOLS = ("solo", "threads", "gevent", "prefork")
AFTER_SETTLING = 3
Sides = dict[str, Side]


def main() -> None:
    """Act as the worker pool, with the strategy, the database and the sides on the command line."""
    pool, strategy, url, *names = sys.argv[1:]
    random.seed(143)  # what is done now and then (old rows of exactly_once) is done after what is counted
    sides = {name: make_side(name, url, strategy, pool) for name in names}
    for name, side in sides.items():
        # The worker pool asyncio is ours: by hand there is the event loop alone.
        side.app.WorkController(pool="solo" if (name, pool) == (BY_HAND, "asyncio") else pool, concurrency=1)

    def execute(command: dict[str, Any]) -> dict[str, Any]:
        return {"found": resolve_name(command["function"])(sides, *command["arguments"])}

    if pool == "gevent":
        import gevent

        gevent.spawn(answer_lines, questions(pool), execute).get()
    elif pool == "asyncio":
        from .awaited import in_a_greenlet

        in_a_greenlet(lambda: answer_lines(questions(pool), execute))
    else:
        answer_lines(questions(pool), execute)
    os._exit(0)


def questions(pool: str) -> Iterator[str]:
    """Yield the lines of the input; after the first, which asks whether this process is ready, be the worker pool's."""
    yield sys.stdin.readline()
    # Awake, and in the main process: valgrind takes orders only from a process that runs, and none for a fork's child.
    while not select.select([0], [], [], 0)[0]:
        time.sleep(0.01)
    if pool == "prefork":
        become_pool_process()
    yield from sys.stdin


def ready(sides: Sides) -> None:
    """Answer the first question."""


def become_pool_process() -> None:
    """Go on in a child of this process, which ends when that does."""
    from billiard.pool import soft_timeout_sighandler

    child = os.fork()
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    signals.worker_process_init.send(sender=None)
    signal.signal(signal.SIGUSR1, soft_timeout_sighandler)


def mark() -> None:
    """Call a function of libc that nothing else calls: valgrind is told to dump and zero its counts there."""
    os.getsid(0)


def settle(side: Side) -> None:
    """Empty the broker, take what is there so far out of the garbage collector, and let it run only when called."""
    side.clear_broker()
    gc.collect()
    gc.freeze()
    gc.disable()


def repeat(sides: Sides, name: str, task: str, tasks: int) -> None:
    """Run a task of a side so often."""
    _repeat(sides[name].tasks[task], tasks)


def mark_slices(sides: Sides, name: str, task: str, slices: list[int]) -> int:
    """Run the slices of a task between two marks each; return the id of this process."""
    side = sides[name]
    run = side.tasks[task]
    for tasks in slices:
        settle(side)
        _repeat(run, AFTER_SETTLING)  # the collector has emptied the free lists
        mark()
        _repeat(run, tasks)
        gc.collect()  # what a task leaves to the collector is counted too
        mark()
    return os.getpid()


def tally(sides: Sides, name: str, task: str, tasks: int) -> dict[str, float]:
    """Return what Python counts by itself: the same on every run of one version. Medians of so many runs.

    "calls": of functions, those written in C included. "blocks": of memory allocated, as far as one sees who looks at
    each call and each return: what is freed before the next look is not seen, nor what comes out of a free list.
    """
    side = sides[name]
    settle(side)
    calls, blocks = zip(*(_tally(side.tasks[task]) for _ in range(tasks)), strict=True)
    return {"calls": statistics.median(calls), "blocks": statistics.median(blocks)}


def _tally(run: Callable[[], object]) -> tuple[int, int]:
    calls = risen = 0
    allocated = sys.getallocatedblocks
    last = allocated()

    def look(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls, risen, last
        now = allocated()
        if now > last:
            risen += now - last
        last = now
        if event in {"call", "c_call"}:
            calls += 1

    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls, risen


def time_rounds(sides: Sides, pair: dict[str, str], rounds: int, tasks: int) -> list[list[float]]:
    """Run a task of each side in turn, the order changing; return CPU time in microseconds per task, by round."""
    found = []
    for number in range(rounds):
        times = dict.fromkeys(pair, 0.0)
        for name in pair if number % 2 else reversed(pair):
            sides[name].clear_broker()
            begin = time.process_time()
            _repeat(sides[name].tasks[pair[name]], tasks)
            times[name] = (time.process_time() - begin) / tasks * 1e6
        found.append(list(times.values()))
    return found


def _repeat(run: Callable[[], object], tasks: int) -> None:
    for _ in range(tasks):
        run()
