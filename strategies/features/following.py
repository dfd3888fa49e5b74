"""Which Session's COMMIT is waited for outside a unit of work: the one that `db.follow(session)` names.

It is kept in a ContextVar, so it is seen in the coroutines and threads that a web framework starts with the context of
the request, and in no other request.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Generic, TypeVar

from ..engines.leaks import Origin, describe
from ..errors import UnseenBlock

Followed = TypeVar("Followed")

SETTLES_S = 0.002
"""A thread gives the context of a call up right after it has reported the call's result: that is waited for, and no
longer than this, for nothing tells whether it will."""
NEW_S = 0.1
"""A block that is older has been given up, or never will be."""


class Following:
    """What a context knows of a block. Only contexts keep it alive: where none does, nobody can see the block."""

    __slots__ = ("__weakref__", "ended", "outer", "session")
    ended: bool
    outer: Following | None
    session: Any

    def __init__(self, session: Any, outer: Following | None) -> None:
        self.session, self.outer, self.ended = session, outer, False


_followed: ContextVar[Following | None] = ContextVar("celery_alchemy_followed", default=None)
#: In what runs after a COMMIT there is nothing left to wait for.
_COMMITTED = Following(None, None)
_open: set[follow[Any]] = set()


class follow(Generic[Followed]):  # noqa: N801 - used as a function is
    """Let what the block sends "on commit" wait for the COMMIT of `session`, where no unit of work is open.

    The end of the block ends nothing but that: what still waits is sent by the COMMIT of the transaction, and dropped
    with its rollback.

    Args:
        session: A Session, a `scoped_session`, or an AsyncSession.
        origin: The place of the block, for messages.
        failed: Called with `session` and the exception when the block has raised.
    """

    session: Followed

    def __init__(self, session: Followed, origin: Origin = None, failed: Any = None) -> None:
        self.session, self._origin, self._failed = session, origin, failed

    def __enter__(self) -> Followed:
        outer = _followed.get()
        following = Following(self.session, outer)
        # Not the token of `set`: that would keep the context alive.
        _followed.set(following)
        # Not a lock or an Event: what is called when an object dies may be called anywhere, even while one is held.
        self._gone: SimpleQueue[Any] = SimpleQueue()
        self._seen_by = weakref.ref(following, self._gone.put)
        self._thread, self._entered = threading.get_ident(), time.monotonic()
        _open.add(self)
        return self.session

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _open.discard(self)
        following = self._seen_by()
        if following is not None:
            following.ended = True
            if _followed.get() is following:
                _followed.set(following.outer)
        if error is not None and self._failed is not None:
            self._failed(self.session, error)
        if following is None and error is None:
            raise self.unseen()

    def is_unseen(self) -> bool:
        """Tell whether no context is left in which the block can be seen."""
        return self._seen_by() is None

    def settle(self, until: float) -> None:
        """Wait until the thread that has entered the block a moment ago has given its context up, if it does.

        Args:
            until: No longer than that, of `monotonic()`.
        """
        now = time.monotonic()
        if self._thread != threading.get_ident() and now - self._entered < NEW_S and now < until:
            with suppress(Empty):
                self._gone.put(self._gone.get(timeout=until - now))  # back, for whoever else waits

    def unseen(self) -> UnseenBlock:
        """Return the error for a block that cannot be seen."""
        return UnseenBlock(
            f"db.follow() at {describe(self._origin)} was entered in a context of its own, which has ended: the code "
            f"that it is for cannot see it, and nothing waits for that Session's COMMIT. FastAPI runs dependencies "
            f"written as `def ...: yield` in a helper thread, with such a context. Enter the block in an `async def` "
            f"dependency that takes the Session: `async def follow(session: Annotated[Session, Depends(get_session)]): "
            f"with db.follow(session): yield`."
        )


def followed(*, settle: bool = True) -> Any:
    """Return the Session whose COMMIT is waited for here; None where there is none.

    Args:
        settle: Wait for a thread that has just entered a block, until it has left the context it was in: see `settle`.
    Raises:
        UnseenBlock: a block is open that nobody can see, so it is not known what belongs to it.
    """
    following = _followed.get()
    if following is _COMMITTED:
        return None
    while following is not None and following.ended:
        following = following.outer
    if following is not None:
        return following.session
    _refuse_unseen(settle)
    return None


def _refuse_unseen(settle: bool) -> None:
    until = time.monotonic() + SETTLES_S if _open and settle else 0.0
    for block in list(_open):
        block.settle(until)
        if block in _open and block.is_unseen():
            raise block.unseen()


def is_committed() -> bool:
    """Tell whether the code here runs after a COMMIT, on behalf of it."""
    return _followed.get() is _COMMITTED


@contextmanager
def after_commit() -> Iterator[None]:
    """Let nothing in the block wait: it runs on behalf of a COMMIT that has been."""
    before = _followed.get()
    _followed.set(_COMMITTED)
    try:
        yield
    finally:
        _followed.set(before)
