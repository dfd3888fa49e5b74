"""Keep an exception that a signal handler raises out of the places where it would lose a connection.

Prefork's soft time limit is such an exception: the handler of SIGUSR1 raises it between any two bytecodes of the main
thread. Inside a connection pool's checkout, a COMMIT or a clean-up it would lose a pool slot for good, or report as
failed what the server has committed. `shield` defers it: the handler notes the signal, and it is raised on leaving.

`pthread_sigmask` would not do: once a second thread exists the kernel delivers the signal there, and CPython still
runs the handler in the main thread.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
_Handler = Callable[[int, FrameType | None], Any]

#: Exceptions that stop a statement from outside, although they are no BaseException: the Celery side adds the soft
#: time limit's. SQLAlchemy knows by itself what to do with SystemExit, GreenletExit and gevent.Timeout.
_interrupt_types: tuple[type[BaseException], ...] = ()


def register_interrupt(error: type[BaseException]) -> None:
    """Treat `error` as an interruption from outside: its connection is discarded, its statement cancelled."""
    global _interrupt_types  # noqa: PLW0603
    if error not in _interrupt_types:
        _interrupt_types = (*_interrupt_types, error)


def is_interrupt(error: BaseException) -> bool:
    """Tell whether `error` came from outside the code it was raised in (a time limit, a kill)."""
    return not isinstance(error, Exception) or isinstance(error, _interrupt_types)


class Shield:
    """Defers one signal's Python handler while the main thread is inside `with shield:`. Not thread-local: only the
    main thread runs signal handlers, and under prefork it alone runs tasks."""

    __slots__ = ("_codes", "_depth", "_main_ident", "_pending", "_wrapped", "installed")

    def __init__(self) -> None:
        self._depth = 0
        self._pending: tuple[int, FrameType | None] | None = None
        self._wrapped: _Handler | None = None
        self._main_ident = 0
        self.installed = False
        """True in a process whose signal is deferred; elsewhere the shield costs nothing but this look."""
        self._codes: set[CodeType] = set()

    def covers(self, function: Function) -> Function:
        """Defer the signal whenever it arrives while `function`'s own frame is the one running: for the few bytecodes
        before a `with shield` is entered and after it is left. Usable as a decorator."""
        self._codes.add(function.__code__)
        return function

    def install(self, signum: int) -> bool:
        """Put the deferring handler around the one in force for `signum`, unless it is there already.

        Cheap enough for every task: the handler may be installed by others after us (billiard does so after
        `worker_process_init`). Does nothing outside the main thread.

        Returns:
            True when it was not there before.
        """
        handler = signal.getsignal(signum)
        if handler == self._handle or not callable(handler):
            return False
        if threading.current_thread() is not threading.main_thread():
            return False
        self._wrapped, self.installed = handler, True
        self._main_ident = threading.get_ident()
        self._depth, self._pending = 0, None
        signal.signal(signum, self._handle)
        return True

    def _handle(self, signum: int, frame: FrameType | None) -> Any:
        if self._depth or (frame is not None and frame.f_code in self._codes):
            self._pending = (signum, None)
            return None
        assert self._wrapped is not None
        return self._wrapped(signum, frame)

    def hold(self) -> None:
        """Defer the signal until `let_go`."""
        if self._wrapped is not None and threading.get_ident() == self._main_ident:
            self._depth += 1

    def let_go(self, *, silent: bool = False) -> None:
        """End one `hold`; after the last, run the handler of a signal that came meanwhile, unless `silent`."""
        if self._wrapped is None or not self._depth or threading.get_ident() != self._main_ident:
            return
        self._depth -= 1
        if not self._depth and self._pending is not None and not silent:
            self.raise_pending()

    def __enter__(self) -> Shield:
        self.hold()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.let_go(silent=exc_info[1] is not None)

    def raise_pending(self) -> None:
        """Run the handler of a signal that was deferred; it raises."""
        pending, self._pending = self._pending, None
        if pending is not None and self._wrapped is not None:
            self._wrapped(*pending)

    def drop_pending(self) -> None:
        """Forget a deferred signal: the work it would stop is committed. Another thread's call changes nothing."""
        if threading.get_ident() == self._main_ident:
            self._pending = None

    def settle(self) -> None:
        """A task request is over: nothing is deferred any more, and what came for it must not hit the next one."""
        if threading.get_ident() == self._main_ident:
            self.reset()

    @property
    def pending(self) -> bool:
        return self._pending is not None

    def reset(self) -> None:
        """Start afresh: for the child of a fork made inside the shield."""
        self._depth, self._pending = 0, None


shield = Shield()
