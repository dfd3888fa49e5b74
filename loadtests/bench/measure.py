"""What processes cost: CPU seconds by process tree, memory, and what the rest of the machine was doing."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import psutil


@dataclass(frozen=True, slots=True)
class CpuClock:
    """CPU seconds spent by every process tree of the machine, up to one moment.

    The kernel counts in ticks, usually 10 ms for each process; differences between two moments do not add up errors.
    """

    _parents: dict[int, int]
    _seconds: dict[int, float]
    busy_s: float
    """By everything on the machine, on all CPUs."""

    @classmethod
    def read(cls) -> Self:
        """Read the clocks of all processes."""
        parents: dict[int, int] = {}
        seconds: dict[int, float] = {}
        for process in psutil.process_iter(["ppid", "cpu_times"]):
            times = process.info["cpu_times"]
            if times is None:
                continue
            parents[process.pid] = process.info["ppid"]
            # Children that have ended and were waited for count for their parent: servers that fork for a connection.
            seconds[process.pid] = times.user + times.system + times.children_user + times.children_system
        machine = psutil.cpu_times()
        idle = machine.idle + getattr(machine, "iowait", 0.0)
        # Guests are counted in user and nice already, and steal is nobody's here.
        twice = getattr(machine, "guest", 0.0) + getattr(machine, "guest_nice", 0.0) + getattr(machine, "steal", 0.0)
        return cls(parents, seconds, sum(machine) - idle - twice)

    def tree(self, root: int) -> set[int]:
        """Return the process and its descendants."""
        children: defaultdict[int, list[int]] = defaultdict(list)
        for pid, parent in self._parents.items():
            children[parent].append(pid)
        found, todo = set[int](), [root]
        while todo:
            pid = todo.pop()
            if pid not in found:
                found.add(pid)
                todo += children[pid]
        return found

    def of(self, processes: set[int]) -> float:
        """Return what the processes have spent."""
        return sum(self._seconds.get(pid, 0.0) for pid in processes)


@dataclass(frozen=True, slots=True)
class Spent:
    """What a stretch of time cost."""

    worker_s: float
    database_s: float | None
    foreign_cpus: float
    """CPUs busy with what is not ours, on average."""


def spent(begin: CpuClock, end: CpuClock, seconds: float, worker_pid: int, database_pid: int | None) -> Spent:
    """Return the CPU seconds between two readings, `seconds` apart."""

    def of(processes: Callable[[CpuClock], set[int]]) -> float:
        # A process that ended unwaited takes its seconds with it.
        return max(0.0, end.of(processes(end)) - begin.of(processes(begin)))

    def ours(clock: CpuClock) -> set[int]:
        # Every server, worker and load generator we start is below this process; a database server need not be.
        return clock.tree(os.getpid()) | (clock.tree(database_pid) if database_pid else set())

    foreign = max(0.0, end.busy_s - begin.busy_s - of(ours)) / seconds if seconds else 0.0
    return Spent(
        worker_s=of(lambda clock: clock.tree(worker_pid)),
        database_s=of(lambda clock: clock.tree(database_pid)) if database_pid else None,
        foreign_cpus=foreign,
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
