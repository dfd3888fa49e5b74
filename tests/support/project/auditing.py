"""Calls that may block, made in the thread of an event loop: noted by what they are, however long they took."""

import asyncio
import functools
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from support.project import tools
from support.project.app import app

SOCKET = ("connect", "recv", "recv_into", "recvfrom", "send", "sendall", "sendmsg", "sendto")
#: The tasks' own talk with their test, and a thread's start, which waits until the thread is there.
LEFT_OUT = ("support/project/tools.py", "support/project/app.py", "threading.py:start")
found: list[str] = []


def audit(owner: Any, name: str, blocks: Callable[..., bool]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if asyncio._get_running_loop() is not None and blocks(*args, **kwargs):
            stack = traceback.walk_stack(sys._getframe(1))
            places = [f"{frame.f_code.co_filename}:{frame.f_code.co_name}" for frame, _ in stack][::-1]
            if not any(left_out in place for place in places for left_out in LEFT_OUT):
                found.append(f"{name} in {' > '.join(places[-16:])}")
        return original(*args, **kwargs)

    setattr(owner, name, call)


for one in SOCKET:
    audit(socket.socket, one, lambda of, *_, **__: of.gettimeout() != 0)
audit(socket, "getaddrinfo", lambda *_, **__: True)
audit(threading.Condition, "wait", lambda *_, **__: True)
audit(time, "sleep", lambda *_, **__: True)


@app.task
async def say_what_blocked(key: str) -> None:
    """Say what has been found so far."""
    await asyncio.to_thread(tools.say, key, list(found))


@app.task
async def block_on_socket() -> None:
    """Do what is noted."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass
