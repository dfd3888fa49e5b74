"""A task request under prefork, where a soft time limit may strike between any two bytecodes.

It is held back but for the task's own code: so either the transaction is committed and the task succeeds, or it is
rolled back and the limit raised.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

from ..strategies.deferring_sessions import shield_mapper_configuration
from ..strategies.engines.blocked import blocked_statements
from ..strategies.entry import Entry
from ..strategies.interrupts import hidden_interrupt, shield
from ..strategies.scope import SCOPE, current_scope
from . import apps
from ._celery import running_request
from .request import Call, Enter, RequestRunner, is_workers, leave_inner, request_of
from .results import FLAT, LARGE, checked

SOFT_LIMIT_SIGNAL = getattr(signal, "SIGUSR1", None)


class DeferringRunner(RequestRunner):
    """Runs the requests of one task in a pool process of prefork."""

    @shield.covers
    def run(self, call: Call, task: Any, args: Any, kwargs: Any) -> Any:
        return self.inside(None, call, task, args, kwargs)

    @shield.covers
    def inside(self, enter: Enter | None, call: Call, task: Any, args: Any, kwargs: Any) -> Any:
        """Run `call` in the unit of work that `enter` opens or joins, and end it; without `enter` it is `run`."""
        # billiard installs its handler after worker_process_init, so the first task is the first chance.
        if SOFT_LIMIT_SIGNAL is not None and shield.install(SOFT_LIMIT_SIGNAL):
            begin_holding_back()
        if not shield.applies:
            if enter is None:
                return super().run(call, task, args, kwargs)
            return super().inside(enter, call, task, args, kwargs)
        request = request_of(task)
        workers = is_workers(request)
        if workers:
            if self.first:
                shield.reset()  # what came too late for the request before is not for this one
            scope = getattr(current_scope(), SCOPE, None)
            if scope is not None and scope.units and any(entry.request is not request for entry in scope.units):
                self.registry.end_abandoned()
        held = shield.depth
        shield.depth = held + 1
        entry: Entry | None = None
        error: BaseException | None = None
        try:
            if enter is not None:
                entry = enter(task)
            elif workers:
                entry = self.begin_run(request, task)
            else:
                entry = self.enter_run(task)
            return self._call(entry, call, task, args, kwargs, held)
        except BaseException as raised:
            error = raised
            raise
        finally:
            if entry is not None:
                if entry.owns and entry.scope.units[-1] is not entry:
                    leave_inner(self.registry, entry)
                self.registry.leave(entry, error)
            shield.depth = held
            goes_on = error is not None and self.goes_on(error)
            over = workers and entry is not None and entry.owns and entry.kind != "hook" and not goes_on
            error = None  # no cycle: exception -> traceback -> this frame -> exception
            if over:
                shield.pending = None  # what it would stop is over
                shield.ended = request.id
            elif entry is None or entry.owns or not entry.ends:  # else the `__call__` around it ends the request
                shield.check_later()

    @shield.covers
    def _call(self, entry: Entry | None, call: Call, task: Any, args: Any, kwargs: Any, held: int) -> Any:
        """Run the task's code, the one place where a limit is raised at once, and end its unit of work."""
        try:
            shield.depth = held
            if shield.pending is not None:
                shield.check()
            result = call(*args, **kwargs)
            kind = type(result)
            flat = kind in FLAT or (kind is str and result.isascii()) or (kind is int and -LARGE < result < LARGE)
            if not flat and entry is not None:
                result = checked(entry, task, result)
            if entry is not None and entry.ends and (entry.opened is not None or entry.has_parts or not entry.owns):
                entry.unit.prepare()  # flushing may take long, and a time limit is right to stop it
            shield.depth = held + 1
        except BaseException as raised:
            shield.depth = held + 1
            if entry is not None and entry.ends:
                entry.fail(raised)
            hidden = hidden_interrupt(raised)
            if hidden is not None:
                raise hidden from None
            raise
        if entry is not None and entry.ends:
            entry.succeed(final=entry.owns)
        return result


def begin_holding_back() -> None:
    """The soft limit has just been taken over from billiard."""
    shield_mapper_configuration()
    shield.is_over = _is_over
    if SOFT_LIMIT_SIGNAL is not None and any(apps_wait_in_c()):
        blocked_statements.watch(SOFT_LIMIT_SIGNAL)


def apps_wait_in_c() -> Iterator[bool]:
    """Tell of each database of each app whether its driver waits inside C, where Python runs no signal handler."""
    for app_db in apps.every():
        for db in app_db.databases.values():
            if db.units.strategy is not None:
                yield db.units.strategy.engines.waits_in_c


def _is_over(request_id: str) -> bool:
    """Tell whether Celery has begun nothing since the request with this id: it stores the result, or waits."""
    request = running_request()
    return request is None or request.id == request_id
