"""What processes cost: CPU seconds by process tree, memory, and what the rest of the machine was doing."""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Self

import psutil


@dataclass(frozen=True, slots=True)
class CpuClock:
    """CPU seconds spent by every process tree of the machine, up to one moment.

    The kernel counts in ticks, usually 10 ms for each process; differences between two moments do not add up errors.
    """

    _children: dict[int, list[int]]
    _seconds: dict[int, float]
    busy_s: float  # By everything on the machine, on all CPUs
    at: float

    @classmethod
    def read(cls) -> Self:
        """Read the clocks of all processes."""
        children: defaultdict[int, list[int]] = defaultdict(list)
        seconds: dict[int, float] = {}
        for process in psutil.process_iter(["ppid", "cpu_times"]):
            if times := process.info["cpu_times"]:
                children[process.info["ppid"]].append(process.pid)
                # Children that have ended and were waited for count for their parent: servers that fork to connect.
                seconds[process.pid] = times.user + times.system + times.children_user + times.children_system
        machine = psutil.cpu_times()
        # Guests are counted in user and nice already, and nothing of ours runs in what was stolen.
        idle = machine.idle + sum(getattr(machine, name, 0.0) for name in ("iowait", "guest", "guest_nice", "steal"))
        return cls(dict(children), seconds, sum(machine) - idle, time.monotonic())

    def spent_by(self, *roots: int | None) -> float:
        """Return what some processes and all their descendants have spent."""
        found, todo = set[int](), [root for root in roots if root]
        while todo:
            pid = todo.pop()
            if pid not in found:
                found.add(pid)
                todo += self._children.get(pid, ())
        return sum(self._seconds.get(pid, 0.0) for pid in found)


@dataclass(frozen=True, slots=True)
class Spent:
    """What a stretch of time cost."""

    wall_s: float
    worker_s: float
    database_s: float | None
    foreign_cpus: float  # CPUs busy with what is not ours, on average


def spent(begin: CpuClock, worker_pid: int, database_pid: int | None) -> Spent:
    """Return what was spent since a reading."""
    end = CpuClock.read()
    wall_s = end.at - begin.at

    def of(*roots: int | None) -> float:
        # A process that ended unwaited takes its seconds with it.
        return max(0.0, end.spent_by(*roots) - begin.spent_by(*roots))

    # Every server, worker and load generator we start is below this process; a database server need not be.
    foreign_s = end.busy_s - begin.busy_s - of(os.getpid(), database_pid)
    return Spent(
        wall_s, of(worker_pid), of(database_pid) if database_pid else None, max(0.0, foreign_s) / max(wall_s, 1e-9)
    )


def memory_bytes(root: int) -> int:
    """Return the proportional set size of a process tree: shared pages counted once, by their shares.

    Where the system does not know it, the unique set size, which leaves shared pages out.
    """
    total = 0
    with contextlib.suppress(psutil.Error):
        main = psutil.Process(root)
        for process in (main, *main.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                memory = process.memory_full_info()
                total += getattr(memory, "pss", 0) or memory.uss
    return total
