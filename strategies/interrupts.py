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
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from types import CodeType, FrameType
from typing import Any, TypeVar

from sqlalchemy.exc import InvalidRequestError, PendingRollbackError

#: `signal.getsignal` without what makes an enum of the answer, where it is none: each task under prefork asks.
getsignal: Callable[[int], Any] = signal._signal.getsignal  # type: ignore[attr-defined]

RETURN_S = 0.25
"""After a COMMIT of its own, a task has so long to return before a signal that came meanwhile is raised."""

current_interruption: ContextVar[Any] = ContextVar("celery_alchemy_interruption", default=None)
"""The `Interruption` of the task request that runs here on an event loop; its child coroutines see it too."""

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


def is_kill(error: BaseException) -> bool:
    """Tell whether `error` kills a greenlet. That may come from the hub, and nothing may wait for it then."""
    return type(error).__name__ == "GreenletExit"


def raise_later(error: BaseException) -> None:
    """Let `error`, which must not be raised here, strike at the next `await` where it is a time limit of the task
    request that runs here on an event loop."""
    interruption = current_interruption.get()
    if interruption is not None and isinstance(error, _interrupt_types):
        interruption.repeat()


def _nobody_knows(ended: str) -> bool:
    return False


class _Quiet(AbstractContextManager[None]):
    """Holds a signal back while it is entered. A class, for each task enters it and a generator takes ten times as
    long."""

    __slots__ = ("_shield",)

    def __init__(self, shield: Shield) -> None:
        self._shield = shield

    def __enter__(self) -> None:
        self._shield.hold()

    def __exit__(self, *exc_info: object) -> None:
        self._shield.let_go()


class Shield:
    """Defers one signal's Python handler while the main thread is inside `with shield:`. Not thread-local: only the
    main thread runs signal handlers, and under prefork it alone runs tasks. In other threads it does nothing."""

    __slots__ = (
        "_codes", "_handling", "_main_ident", "_original", "_ours", "_quiet", "_repeater", "_wrapped",
        "depth", "ended", "handed_to", "installed", "is_over", "noticed", "pending",
    )  # fmt: skip

    def __init__(self) -> None:
        self._wrapped: _Handler | None = None
        self._original: _Handler | None = None
        self._handling = False
        self._main_ident = 0
        self._codes: set[CodeType] = set()
        self._quiet = _Quiet(self)
        self._repeater: _Repeater | None = None
        self._ours = self._handle
        self.installed: bool = False
        """True in a process whose signal is deferred; elsewhere the shield costs nothing but this look."""
        self.depth: int = 0
        """How many times the signal is held back; a plain number, for no bytecode may come between two of them."""
        self.pending: int | None = None
        """The signal that came meanwhile."""
        self.ended: str | None = None
        """The id of the task request that has ended last, its transaction with it; None while one runs."""
        self.is_over: Callable[[str], bool] = _nobody_knows
        """Tells whether nothing has begun since that request ended; the Celery side knows."""
        self.noticed: Callable[[], None] | None = None
        """Called first whenever the signal's Python handler runs."""
        self.handed_to: Callable[[], object] | None = None
        """Called when the signal is held back: what it is to stop runs in another thread."""

    def covers(self, function: Function) -> Function:
        """Defer the signal whenever it arrives while `function`'s own frame is the one running: for the few bytecodes
        before `depth` is raised and after it is lowered. Usable as a decorator."""
        self._codes.add(function.__code__)
        return function

    def install(self, signum: int) -> bool:
        """Put the deferring handler around the one in force for `signum`, unless it is there already.

        Cheap enough for every task: the handler may be installed by others after us (billiard does so after
        `worker_process_init`). Does nothing outside the main thread.

        Returns:
            True when it was not there before.
        """
        handler = getsignal(signum)
        if handler is self._ours or not callable(handler):
            return False
        if threading.current_thread() is not threading.main_thread():
            return False
        self._wrapped, self.installed = handler, True
        self._original = self._original or handler
        self._main_ident = threading.get_ident()
        self.reset()
        signal.signal(signum, self._ours)
        return True

    def handles(self, signum: int) -> bool:
        """Tell whether the deferring handler is the one in force for `signum`."""
        return getsignal(signum) is self._ours

    @property
    def applies(self) -> bool:
        """True where the signal is deferred, and in the thread that it interrupts."""
        return self.installed and threading.get_ident() == self._main_ident

    def _handle(self, signum: int, frame: FrameType | None) -> Any:
        if self.noticed is not None:
            self.noticed()
        repeater = self._repeater
        if repeater is not None and repeater.sent:
            repeater.sent = False
            if self.pending is None:
                return None  # raised meanwhile, or the task has returned
        if self.depth or (frame is not None and frame.f_code in self._codes):
            self.pending = signum
            if self.handed_to is not None:
                self.handed_to()
            return None
        self.pending = None
        if self.ended is not None and self.is_over(self.ended):
            # The task is committed, or rolled back. A limit now would strike Celery while it stores that, and report as
            # failed what the database has.
            return None
        return self._pass_on(signum, frame)

    def _pass_on(self, signum: int, frame: FrameType | None) -> Any:
        assert self._wrapped is not None
        assert self._original is not None
        if self._handling:
            # A handler put around ours since, which `install` has wrapped in turn, calls us: it wants the first one.
            return self._original(signum, frame)
        self._handling = True
        try:
            return self._wrapped(signum, frame)
        finally:
            self._handling = False

    def hold(self) -> None:
        """Defer the signal until `let_go`."""
        if self.installed and threading.get_ident() == self._main_ident:
            self.depth += 1

    def let_go(self) -> None:
        """End one `hold`. What came meanwhile waits for `check`."""
        if self.depth and self.installed and threading.get_ident() == self._main_ident:
            self.depth -= 1

    def check(self) -> None:
        """Run the handler of a signal that was deferred, unless it is still held back; the handler raises."""
        if self.pending is not None and not self.depth and self.applies and self._wrapped is not None:
            signum, self.pending = self.pending, None
            self._pass_on(signum, None)

    def check_later(self) -> None:
        """Let a signal that came in a COMMIT wait until the task goes on: no work that is committed is to be lost.

        A task that returns now has succeeded. One that uses a database, or is still there after `RETURN_S`, meets it.
        """
        if self.pending is not None and not self.depth and self.applies:
            repeater = self._repeater
            if repeater is None or not repeater.is_alive():
                self._repeater = _Repeater(self)
                self._repeater.start()

    def quiet(self) -> AbstractContextManager[None]:
        """Defer the signal for the block, and let it wait for the next `check` afterwards."""
        return self._quiet

    def __enter__(self) -> Shield:
        if self.installed and threading.get_ident() == self._main_ident:
            self.depth += 1
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.let_go()
        if self.pending is not None and exc_info[1] is None:
            self.check()

    def reset(self) -> None:
        """Start afresh: at the end of a task request, and in the child of a fork made inside the shield."""
        self.depth, self.pending, self.ended = 0, None, None


class _Repeater(threading.Thread):
    """Sends the main thread a signal again that waits, until it does not wait any more.

    The signal's own handler may not be called at any other place than between two bytecodes of the main thread, and
    `time.sleep` must not outlast it: so a signal it is.
    """

    def __init__(self, shield: Shield) -> None:
        super().__init__(name="celery-alchemy-limit", daemon=True)
        self._shield = shield
        self.sent = False
        """The signal that comes next is such a repetition."""

    def run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        shield, main = self._shield, threading.main_thread()
        time.sleep(RETURN_S)
        while (signum := shield.pending) is not None and main.ident is not None:
            self.sent = True
            signal.pthread_kill(main.ident, signum)
            time.sleep(RETURN_S)


def hidden_interrupt(error: BaseException) -> BaseException | None:
    """Return the interruption that SQLAlchemy raised `error` over; None when there is none.

    Struck in its own bookkeeping, SQLAlchemy raises an error of its own on the way out ("This transaction is closed"),
    or fails an assertion that says nothing. An error of the database, or one that asks for a rollback, is the task's
    own and stays.
    """
    if (isinstance(error, InvalidRequestError) and not isinstance(error, PendingRollbackError)) or (
        isinstance(error, AssertionError) and not error.args
    ):
        struck = error.__cause__ or error.__context__
        if struck is not None and is_interrupt(struck):
            return struck
    return None


shield: Shield = Shield()
for _method in (
    *(Shield.hold, Shield.let_go, Shield.check, Shield.check_later, Shield.reset, Shield.__enter__, Shield.__exit__),
    *(Shield.quiet, _Quiet.__enter__, _Quiet.__exit__),
):
    shield.covers(_method)
shield.covers(Shield.applies.fget)  # type: ignore[attr-defined]
