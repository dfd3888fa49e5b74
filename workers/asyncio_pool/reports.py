"""What the consumer's request is told of a job: accepted, succeeded, failed, out of time, revoked."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any

from billiard.einfo import ExceptionInfo
from celery.exceptions import WorkerLostError
from celery.worker import state

from .._celery import was_revoked

logger: logging.Logger = logging.getLogger(__name__)


class JobPid(int):
    """The process id that a request is told; `revoke(terminate=True)` gives it back, and it knows its job."""

    job: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)


class Report:
    """The callbacks of one request, as the consumer gave them to the worker pool."""

    __slots__ = ("_accept", "_failed", "_succeeded", "_timed_out", "pid", "request")

    def __init__(
        self,
        accept: Callable[..., Any] | None,
        succeeded: Callable[..., Any] | None,
        failed: Callable[..., Any] | None,
        timed_out: Callable[..., Any] | None,
    ) -> None:
        self._accept, self._succeeded, self._failed, self._timed_out = accept, succeeded, failed, timed_out
        self.request: Any = getattr(accept, "__self__", None)
        """The consumer's request; None where something else has called the worker pool."""
        self.pid: JobPid = JobPid(os.getpid())

    def is_unwanted(self) -> bool:
        """Tell whether the request may have been revoked, or have expired, while it waited for a slot."""
        request = self.request
        return request is not None and bool(
            request.id in state.revoked or request.expires or (state.revoked_stamps and request.stamped_headers)
        )

    def is_told_to_end(self) -> bool:
        """Tell whether the request has been revoked; one that is cancelled otherwise goes back to the broker."""
        request = self.request
        return request is not None and bool(
            request.id in state.revoked or (state.revoked_stamps and request.stamped_headers)
        )

    def accepted(self) -> None:
        """The request begins: acknowledged where it is not to be late."""
        if self._accept is not None:
            try:
                self._accept(self.pid, time.monotonic())
            except Exception:
                logger.exception("Accepting %s failed", self)

    def succeeded(self, outcome: Any) -> None:
        """The tracer has ended: well, or with an error that it has stored."""
        if self._succeeded is not None:
            self._safely(self._succeeded, outcome)

    def failed(self, error: ExceptionInfo) -> None:
        """An error has left the tracer: what could not be stored, or an exception that is no Exception."""
        logger.debug("%s has not been reported by its tracer: %r", self, error.exception)
        if self._failed is not None:
            self._safely(self._failed, error)

    def timed_out(self, seconds: float, *, soft: bool) -> None:
        """A time limit has passed."""
        if self._timed_out is not None:
            if soft:
                self._timed_out(soft=True, timeout=seconds)
            else:
                self._safely(self._timed_out, soft=False, timeout=seconds)

    def revoke(self) -> bool:
        """Make it REVOKED and acknowledge it, where it has been revoked or has expired; tell whether it has been."""
        request = self.request
        if request is None:
            return False
        try:
            return bool(request.revoked())
        except Exception:
            logger.exception("%s is revoked, but that could not be stored", self)
            self._settle(acknowledges=True)
            return True

    def settle_revoked(self) -> None:
        """Acknowledge a request that was revoked while it ran, where Celery could not store that and gave up."""
        request = self.request
        if self.is_told_to_end() and not request.acknowledged and not was_revoked(request):
            self._settle(acknowledges=True)

    def _safely(self, callback: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            callback(*args, **kwargs)
        except BaseException:
            logger.exception("Reporting %s failed; its message is settled all the same", self)
            self._settle(self._acknowledges(timeout="timeout" in kwargs))

    def _acknowledges(self, *, timeout: bool) -> bool:
        task = getattr(self.request, "task", None)
        name = "acks_on_timeout" if timeout else "acks_on_failure"  # Celery 5.7
        return bool(getattr(task, name, getattr(task, "acks_on_failure_or_timeout", True)))

    def _settle(self, acknowledges: bool) -> None:
        """See to it that the message is not left unacknowledged for ever."""
        request = self.request
        if request is None or request.acknowledged:
            return
        try:
            if acknowledges:
                request.acknowledge()
            else:
                request.reject(requeue=True)
        except Exception:
            logger.exception("The message of %s could not be settled", self)

    def __str__(self) -> str:
        return str(self.request) if self.request is None else self.request.humaninfo()


def as_info(error: BaseException) -> ExceptionInfo:
    """Return what a request is told of `error`, which has left the tracer and is being handled. What would end a pool
    process of prefork is a lost worker here too, and no end of this process."""
    if not isinstance(error, MemoryError | SystemExit | KeyboardInterrupt | GeneratorExit):
        return ExceptionInfo((type(error), error, error.__traceback__))
    try:
        raise WorkerLostError(f"The task raised {error!r}.") from error
    except WorkerLostError:
        return ExceptionInfo()
