"""How a pool process lets the worker's main process see what it is doing, even while it is stuck in a query.

A file in memory that both have mapped: the pool process writes, with no system call, and the main process reads when
somebody asks. A thread in the pool process would see it too, but would have to be there, in every process that forks.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.pool import QueuePool

from ..interrupts import shield
from .activity import describe

if TYPE_CHECKING:
    from ..unit_of_work import UnitOfWork
    from .activity import Activities, Activity

PLACES = 4
"""Units of work in one another; deeper ones are not shown."""
_TEXT = 240
_HEADER = struct.Struct("<IQIdHII")  # pid, ended, leaks, longest_s, length of its label, connections out, open
_RECORD = struct.Struct("<B??IddHH")  # used, executing, in transaction, statements, began, at, lengths of both texts
_FLAGS = struct.Struct("<B??Idd")
_LENGTH = struct.Struct("<H")
_HEADER_SIZE = 512
_RECORD_SIZE = 1024
_SIZE = _HEADER_SIZE + PLACES * _RECORD_SIZE
_ORDERS = "orders"
_ORDER = struct.Struct("<d")


def make_folder(folder: Path) -> None:
    """Prepare `folder` for the boards of a worker's pool processes."""
    (folder / _ORDERS).write_bytes(_ORDER.pack(0.0))


def order_recycling(folder: Path) -> None:
    """Tell all pool processes to close their connections: each does when it begins its next unit of work."""
    with (folder / _ORDERS).open("r+b") as orders:
        orders.write(_ORDER.pack(time.time()))


class Board:
    """What this pool process is doing, for the main process to read."""

    def __init__(self, folder: Path) -> None:
        path = folder / str(os.getpid())
        path.write_bytes(bytes(_SIZE))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _SIZE)
        with (folder / _ORDERS).open("rb") as file:
            self._orders = mmap.mmap(file.fileno(), _ORDER.size, access=mmap.ACCESS_READ)
        self._obeyed = _ORDER.unpack_from(self._orders)[0]
        _HEADER.pack_into(self._map, 0, os.getpid(), 0, 0, 0.0, 0, 0, 0)

    @shield.covers
    def ordered(self) -> bool:
        """Tell whether the main process wants the connections closed, and has not been told so before."""
        order = _ORDER.unpack_from(self._orders)[0]
        wanted, self._obeyed = order != self._obeyed, order
        return bool(wanted)

    @shield.covers
    def write(self, activity: Activity) -> None:
        """Write that it begins."""
        if activity.place < PLACES:
            at = _HEADER_SIZE + activity.place * _RECORD_SIZE
            label = activity.label.encode()[:_TEXT]
            _RECORD.pack_into(self._map, at, 1, False, False, 0, activity.began, activity.at, len(label), 0)
            at += _RECORD.size
            self._map[at : at + len(label)] = label

    @shield.covers
    def write_statement(self, activity: Activity) -> None:
        """Write that a statement begins."""
        if activity.place < PLACES:
            at = _HEADER_SIZE + activity.place * _RECORD_SIZE
            statement = activity.statement[:_TEXT].encode()[:_TEXT]
            self.touch(activity)
            _LENGTH.pack_into(self._map, at + _RECORD.size - _LENGTH.size, len(statement))
            at += _RECORD.size + _TEXT
            self._map[at : at + len(statement)] = statement

    @shield.covers
    def touch(self, activity: Activity) -> None:
        """Write what has changed since the statement began."""
        if activity.place < PLACES:
            at = _HEADER_SIZE + activity.place * _RECORD_SIZE
            _FLAGS.pack_into(
                self._map, at, 1, activity.executing, activity.in_transaction, activity.statements, activity.began,
                activity.at,
            )  # fmt: skip

    @shield.covers
    def erase(self, place: int) -> None:
        """Take away what stands at `place`."""
        if place < PLACES:
            self._map[_HEADER_SIZE + place * _RECORD_SIZE] = 0

    @shield.covers
    def write_totals(self, totals: Activities, unit: UnitOfWork) -> None:
        """Write what there was so far; `unit` has just ended."""
        longest_s, label = totals.longest
        raw = label.encode()[:_TEXT]
        pools = [engine.pool for part in unit.all_parts for engine in part.strategy.engines_made()]
        out = sum(pool.checkedout() for pool in pools if isinstance(pool, QueuePool))
        idle = sum(pool.checkedin() for pool in pools if isinstance(pool, QueuePool))
        _HEADER.pack_into(
            self._map, 0, os.getpid(), totals.ended, totals.leaks, longest_s, len(raw), out, out + idle
        )  # fmt: skip
        self._map[_HEADER.size : _HEADER.size + len(raw)] = raw


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the report of every pool process that is alive; the boards of others are thrown away."""
    found: list[dict[str, Any]] = []
    if not folder.is_dir():
        return found  # somebody has cleaned up behind our back
    for path in sorted(folder.iterdir(), key=lambda path: path.name.zfill(12)):
        if path.name == _ORDERS:
            continue
        if not is_alive(int(path.name)):
            path.unlink(missing_ok=True)
            continue
        data = path.read_bytes()
        if len(data) == _SIZE:
            found.append(_parse(data, time.monotonic()))
    return found


def _parse(data: bytes, now: float) -> dict[str, Any]:
    pid, ended, leaks, longest_s, length, out, connections = _HEADER.unpack_from(data)
    longest = data[_HEADER.size : _HEADER.size + length].decode(errors="replace")
    opened = []
    for place in range(PLACES):
        at = _HEADER_SIZE + place * _RECORD_SIZE
        used, executing, in_transaction, statements, began, last, name, text = _RECORD.unpack_from(data, at)
        if used:
            at += _RECORD.size
            label = data[at : at + name].decode(errors="replace")
            statement = data[at + _TEXT : at + _TEXT + text].decode(errors="replace")
            opened.append(describe(label, now, began, last, statements, statement, executing, in_transaction))
    out = max(out, sum(1 for one in opened if one["state"] != "no transaction"))
    return {
        "pid": pid,
        "open": opened,
        "ended": ended,
        "longest": {"task": longest, "s": round(longest_s, 3)} if longest else None,
        "leaks": leaks,
        "connections": {"open": max(connections, out), "checked out": out},
    }


def is_alive(pid: int) -> bool:
    """Tell whether there is a process with this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
