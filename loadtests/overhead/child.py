"""The process that is measured: it acts as one worker pool, with one strategy, and runs tasks of one side or of both.

It runs them in one thread, with no broker behind it. Started by `command`, for under gevent nothing may be imported
before the patch. It answers on standard output, a line of JSON at a time, and ends without a clean-up that would be
counted.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

from celery import signals

from .rows import Side, make_side

WORKER_POOLS = ("solo", "threads", "gevent", "prefork")
INSTRUCTIONS, TALLIES, ROUND_TRIPS, TIMES = "instructions", "tallies", "round trips", "times"
AFTER_SETTLING = 3
#: Few leave Python's adaptive interpreter with code to adapt, which then is counted.
WARM_UP_TASKS = {INSTRUCTIONS: 40, TALLIES: 30, ROUND_TRIPS: 10, TIMES: 300}


@dataclass(frozen=True, slots=True)
class Job:
    """What the process is to do."""

    measure: str  # INSTRUCTIONS, TALLIES, ROUND_TRIPS or TIMES
    pool: str
    strategy: str
    url: str
    sides: tuple[str, ...]
    pairs: tuple[tuple[str, ...], ...]
    """The tasks to run, keys of `Side.tasks`: one for each side, those of a pair in turn."""
    slices: tuple[int, ...]  # Tasks per slice
    seed: int = 0  # Of Python's hashes: the same order of sets on every run


def command(job: Job) -> list[str]:
    """Return the arguments of Python that run `job`."""
    # The patch comes first, and therefore not from a module of this package.
    first = "from gevent import monkey; monkey.patch_all(); " if job.pool == "gevent" else ""
    return ["-c", f"{first}from {__name__} import main; main()", json.dumps(asdict(job))]


def main() -> None:
    """Do the job on the command line."""
    given: dict[str, Any] = json.loads(sys.argv[1])
    job = Job(**given)
    sides = [make_side(side, job.url, job.strategy) for side in job.sides]
    for side in sides:
        side.app.WorkController(pool=job.pool, concurrency=1)
    measures = {INSTRUCTIONS: mark_slices, TALLIES: tally, ROUND_TRIPS: run_when_told, TIMES: time_rounds}
    measure: Callable[[list[Side], Job], object] = measures[job.measure]
    if job.measure == INSTRUCTIONS:
        tell(os.getpid())
        wait_for_a_line()  # in the main process: valgrind takes no orders for the child of a fork
    if job.pool == "prefork":
        become_pool_process()
    if job.pool == "gevent":
        import gevent

        tell(gevent.spawn(measure, sides, job).get())
    else:
        tell(measure(sides, job))
    os._exit(0)


def become_pool_process() -> None:
    """Go on in a child of this process, which ends when that does."""
    from billiard.pool import soft_timeout_sighandler

    child = os.fork()
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    signals.worker_process_init.send(sender=None)
    signal.signal(signal.SIGUSR1, soft_timeout_sighandler)


def tell(message: object) -> None:
    """Print `message` as one line."""
    sys.stdout.write(f"{json.dumps(message)}\n")
    sys.stdout.flush()


def wait_for_a_line() -> None:
    """Wait for a line on standard input, awake: valgrind takes orders only from a process that runs."""
    os.set_blocking(0, False)
    while True:
        try:
            if os.read(0, 1):
                return
            os._exit(1)  # whoever started this has gone
        except BlockingIOError:
            time.sleep(0.01)


def mark() -> None:
    """Call a function of libc that nothing else calls: valgrind is told to dump and zero its counts there."""
    os.getsid(0)


def settle(side: Side) -> None:
    """Empty the broker, take what is there so far out of the garbage collector, and let it run only when called."""
    side.clear_broker()
    gc.collect()
    gc.freeze()
    gc.disable()


def mark_slices(sides: list[Side], job: Job) -> tuple[int, list[tuple[str, int]]]:
    """Run the slices of each task between two marks; return the id of this process, and which they were."""
    done: list[tuple[str, int]] = []
    (side,) = sides
    for (name,) in job.pairs:
        run = _warmed_up(side, name, job)
        for tasks in job.slices:
            settle(side)
            _repeat(run, AFTER_SETTLING)  # the collector has emptied the free lists
            mark()
            _repeat(run, tasks)
            gc.collect()  # what a task leaves to the collector is counted too
            mark()
            done.append((name, tasks))
    return os.getpid(), done


def tally(sides: list[Side], job: Job) -> dict[str, dict[str, float]]:
    """Return what Python counts by itself, by task: the same on every run of one version. Medians of so many runs.

    "calls": of functions, those written in C included. "blocks": of memory allocated, as far as one sees who looks at
    each call and each return: what is freed before the next look is not seen, nor what comes out of a free list.
    """
    (side,) = sides
    found = {}
    for (name,) in job.pairs:
        run = _warmed_up(side, name, job)
        settle(side)
        calls, blocks = zip(*(_tally(run) for _ in range(job.slices[0])), strict=True)
        found[name] = {"calls": statistics.median(calls), "blocks": statistics.median(blocks)}
    return found


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


def run_when_told(sides: list[Side], job: Job) -> None:
    """Run each task, and wait for a line before and after: a proxy outside counts."""
    (side,) = sides
    for (name,) in job.pairs:
        run = _warmed_up(side, name, job)
        tell(name)
        wait_for_a_line()
        _repeat(run, job.slices[0])
        tell(name)
        wait_for_a_line()


def time_rounds(sides: list[Side], job: Job) -> list[list[tuple[float, ...]]]:
    """Return for each pair its rounds: CPU time in microseconds per task, of each side, the order changing."""
    outcomes = []
    for names in job.pairs:
        runs = [_warmed_up(side, name, job) for side, name in zip(sides, names, strict=True)]
        rounds = []
        for number, tasks in enumerate(job.slices):
            times = {}
            for place in range(len(runs)) if number % 2 else reversed(range(len(runs))):
                sides[place].clear_broker()
                begin = time.process_time()
                _repeat(runs[place], tasks)
                times[place] = (time.process_time() - begin) / tasks * 1e6
            rounds.append(tuple(times[place] for place in range(len(runs))))
        outcomes.append(rounds)
    return outcomes


def _warmed_up(side: Side, name: str, job: Job) -> Callable[[], object]:
    run = side.tasks[name]
    _repeat(run, WARM_UP_TASKS[job.measure])
    return run


def _repeat(run: Callable[[], object], tasks: int) -> None:
    for _ in range(tasks):
        run()
