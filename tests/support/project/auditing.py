"""Calls that may block, made in the thread of an event loop: noted by what they are, however long they took.

Each function in C that is called there is looked at, whoever calls it, so nothing is missed that is written in Python:
a socket that blocks, a lock that another thread has, a queue that is empty, a sleep, a file that is flushed to disk.
"""

import asyncio
import functools
import socket
import sys
from types import FrameType
from typing import Any

from celery_alchemy import AsyncDatabaseTask
from support.project import tools
from support.project.app import app

SOCKET = frozenset(("accept", "connect", "recv", "recv_into", "recvfrom", "send", "sendall", "sendmsg", "sendto"))
#: Names of functions that wait, whatever they are called with.
WAIT = frozenset(("sleep", "getaddrinfo", "gethostbyname", "waitpid", "wait4", "fsync", "fdatasync", "system", "flock"))
#: The tasks' own talk with their test; the threads of asyncio's own executor, which the worker pool asyncio replaces; a
#: log line, which waits while another thread writes one; looks that do not wait.
LEFT_OUT = (
    *(
        "support/project/tools.py",
        "support/project/app.py",
        "futures/thread.py:_adjust_thread_count",
        "logging/__init__.py:acquire",
    ),
    *("engines/held.py:_look_of", "engines/held.py:_is_dead", "engines/held.py:take"),  # looks, with a timeout of 0
)
MAY_TRY = ("_is_owned", "_wait_for_tstate_lock", "is_alive")
found: list[str] = []


def waits(frame: FrameType, function: Any) -> bool:
    """Tell whether the call of `function` that `frame` makes may wait for somebody."""
    name, owner = function.__name__, getattr(function, "__self__", None)
    kind = type(owner).__name__
    if name in SOCKET and hasattr(owner, "gettimeout"):
        return bool(owner.gettimeout() != 0)
    if kind in {"lock", "RLock"} and name in {"acquire", "__enter__"}:
        return is_taken(owner) and frame.f_code.co_name not in MAY_TRY
    if kind == "SimpleQueue" and name == "get":
        return bool(owner.empty())
    if name in {"poll", "select"}:
        return not frame.f_code.co_filename.endswith("selectors.py") or not is_loops(frame)
    return name in WAIT


def is_taken(lock: Any) -> bool:
    return bool(lock.locked()) if hasattr(lock, "locked") else not lock._is_owned() and "count=0" not in repr(lock)


def is_loops(frame: FrameType) -> bool:
    caller = frame.f_back
    return caller is not None and caller.f_code.co_name in {"_run_once", "select"}


def look(frame: FrameType, event: str, function: Any) -> None:
    if event != "c_call" or not waits(frame, function):
        return
    places, at = [], frame
    while at is not None:
        places.append(f"{at.f_code.co_filename}:{at.f_code.co_name}")
        at = at.f_back  # type: ignore[assignment]
    if not any(left_out in place for place in places for left_out in LEFT_OUT):
        found.append(f"{function.__name__} in {' > '.join(places[30::-1])}")


_run_forever = asyncio.BaseEventLoop.run_forever


def run_forever(self: Any) -> None:
    """Look at all that this thread does from now on."""
    sys.setprofile(look)
    _run_forever(self)


asyncio.BaseEventLoop.run_forever = run_forever  # type: ignore[method-assign]
task = functools.partial(app.task, base=AsyncDatabaseTask)


@task
async def say_what_blocked(key: str) -> None:
    """Say what has been found so far."""
    await asyncio.to_thread(tools.say, key, list(found))


@task
async def block_on_socket() -> None:
    """Do what is noted."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass
