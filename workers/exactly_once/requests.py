"""Celery's main process and a request of a task with `exactly_once`: one that was revoked, whose pool process was lost,
or that took too long."""

from __future__ import annotations

from typing import Any

from celery.utils.functional import maybe_list
from celery.worker import state
from celery.worker.request import Request

from ..apps import find
from .discarded import REVOKED, is_redelivered
from .ids import fix_links, key_of

PATH = "celery_alchemy.workers.exactly_once.requests:OnceRequest"


class OnceRequest(Request):  # type: ignore[misc]
    """A request whose message goes back to the broker when its pool process was lost, whatever the result backend
    says.

    Where that says SUCCESS, Celery 5.7 acknowledges the message. But links, the rest of a chain and the part of a chord
    may not have been sent. Delivered again, the row of the task is found, and what is left is done.

    The errbacks that are sent here have the ids that the pool process gives them: a copy of the request may fail too.
    """

    def maybe_expire(self) -> Any:
        """Tell whether it has expired; one that is delivered again expires in its pool process."""
        return False if self._is_for_pool_process() else super().maybe_expire()

    def revoked(self) -> Any:
        """Tell whether it was revoked; one that is delivered again is revoked in its pool process."""
        if not self._is_for_pool_process() or not self._was_revoked():
            return super().revoked()
        self.request_dict[REVOKED] = True
        return False

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """A time limit has struck."""
        if not soft:
            self._fix_links()
        super().on_timeout(soft, timeout)

    def on_failure(self, *args: Any, **kwargs: Any) -> Any:
        """The request has failed, or its pool process is lost."""
        self._fix_links()
        return super().on_failure(*args, **kwargs)

    def _fix_links(self) -> None:
        fix_links(self._context, key_of(self._context))

    def _success_was_stored(self) -> Any:
        goes_back = self.task.acks_late and self.task.reject_on_worker_lost and self._is_recorded()
        return False if goes_back else super()._success_was_stored()

    def _is_for_pool_process(self) -> bool:
        """Tell whether its pool process says what becomes of it."""
        return is_redelivered(self) and self._is_recorded()

    def _is_recorded(self) -> bool:
        """Tell whether its task has `exactly_once`. A class has its Request from one that it inherits from, and may
        have no `exactly_once` itself: nobody looks for its row."""
        db = find(self.task.app)
        return db is not None and db.records(self.task.name)

    def _was_revoked(self) -> bool:
        """Tell whether the worker was told to revoke this id, or one of the stamps."""
        return self.id in state.revoked or any(
            one in (maybe_list(state.revoked_stamps[name]) or ())
            for name in self.stamps
            if name in state.revoked_stamps
            for one in maybe_list(self.stamps[name]) or ()
        )
