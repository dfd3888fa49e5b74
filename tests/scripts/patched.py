"""Importing this first monkey patches the interpreter as its one argument, JSON, says.

`library` is gevent, eventlet or threads; the modules in `before` are imported before the patch. What the rest of a
program needs of the library, under the same names for all, is here too.
"""

import importlib
import json
import sys

settings = json.loads(sys.argv[1])
assert "sqlalchemy" not in sys.modules, "the monkey patch comes first"
for module in settings.get("before", ()):
    importlib.import_module(module)
library = settings["library"]
if library == "gevent":
    from gevent import monkey

    monkey.patch_all()
elif library == "eventlet":
    import eventlet

    eventlet.monkey_patch()

import threading  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Callable, Iterable  # noqa: E402
from typing import Any  # noqa: E402

JOIN_TIMEOUT_S = 60
sleep = time.sleep
failures: list[str] = []


def spawn(body: Callable[..., object], *arguments: Any) -> Any:
    """Start a greenlet or thread; what it raises, if it is an error, ends up in `failures`."""

    def guarded() -> None:
        try:
            body(*arguments)
        except Exception:
            failures.append(traceback.format_exc())

    if library == "gevent":
        import gevent

        return gevent.spawn(guarded)
    if library == "eventlet":
        return eventlet.spawn(guarded)
    thread = threading.Thread(target=guarded)
    thread.start()
    return thread


def join(greenlets: Iterable[Any]) -> None:
    """Wait for greenlets or threads; raise what went wrong in one of them, or when they do not end."""
    for greenlet in greenlets:
        if library == "eventlet":
            with eventlet.Timeout(JOIN_TIMEOUT_S, RuntimeError("a greenlet does not end")):
                try:
                    greenlet.wait()
                except BaseException as error:
                    if not is_kill(error):
                        raise
            continue
        greenlet.join(JOIN_TIMEOUT_S)
        if not greenlet.ready() if library == "gevent" else greenlet.is_alive():
            raise RuntimeError("a greenlet does not end")
    if failures:
        raise RuntimeError(f"{len(failures)} failed, the first with\n{failures.pop(0)}")


def run(body: Callable[..., object], count: int) -> None:
    """Run `body(number)` in `count` greenlets at once."""
    join([spawn(body, number) for number in range(count)])


def kill(greenlet: Any) -> None:
    """Raise GreenletExit in a greenlet, without waiting for it."""
    if library == "gevent":
        greenlet.kill(block=False)
    else:
        greenlet.kill()


def is_kill(error: BaseException) -> bool:
    import greenlet

    return isinstance(error, greenlet.GreenletExit)


def timeout(seconds: float) -> Any:
    """Return a context manager that raises the library's Timeout, a BaseException, in its block."""
    if library == "gevent":
        import gevent

        return gevent.Timeout(seconds)
    return eventlet.Timeout(seconds)
