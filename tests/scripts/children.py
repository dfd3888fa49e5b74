"""Forking a child and hearing from it, within bounds."""

import faulthandler
import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any

#: A child that hangs says where, and ends itself; failing that, it is killed.
HANGS_AFTER_S = 15
KILLED_AFTER_S = 20


def forked(child: Callable[[], Any], *, plain_exit: bool = False) -> dict[str, Any]:
    """Run `child` in a fork; return its `answer` (or `error`), its exit `status`, and whether it was killed (`hung`).

    The child ends in `os._exit`, without any clean-up; with `plain_exit` as a program ends, by what `child` raises.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        # No thread does this, so that it works in the child of a child, and under a lock.
        faulthandler.register(signal.SIGALRM, chain=True)
        signal.alarm(HANGS_AFTER_S)
        _run(child, writer, plain_exit)
    os.close(writer)
    return wait(pid, reader)


def _run(child: Callable[[], Any], writer: int, plain_exit: bool) -> None:
    if plain_exit:
        child()
    try:
        message = {"answer": child()}
    except BaseException:
        message = {"error": traceback.format_exc()}
    os.write(writer, json.dumps(message).encode())
    os._exit(0)


def wait(pid: int, reader: int) -> dict[str, Any]:
    """Wait for a child, and for what it wrote to the pipe that it inherited."""
    deadline = time.monotonic() + KILLED_AFTER_S
    hung = False
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            hung = True
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)
    os.set_blocking(reader, False)
    try:
        text = os.read(reader, 1 << 20)
    except BlockingIOError:  # a grandchild still has the other end
        text = b""
    os.close(reader)
    code = os.waitstatus_to_exitcode(status)
    return {"status": code, "hung": hung} | json.loads(text or b"{}")
