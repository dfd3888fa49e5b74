"""A task request whose effects in the database happen once.

look       is the task recorded? Then its body does not run, and what is recorded is returned
run        the body, as without; its row is written by `strategies.features.exactly_once`
lost       another copy has the row, or had it first: wait for its end without a connection, then look again
failed     the body may have failed because another copy was first: look before Celery is told of a failure
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import random
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from celery.exceptions import Ignore, TaskPredicate
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from ...strategies.engines.elsewhere import Attempt as Watch
from ...strategies.engines.transient import is_conflict, is_lock_timeout
from ...strategies.errors import InvalidSetting, ResultLost
from ...strategies.features.completed import REPLACED, SENT, Key, Record
from ...strategies.features.exactly_once import ATTEMPT, Attempt, Mode, Superseded
from ...strategies.interrupts import current_interruption, is_interrupt
from ...strategies.scope import runs_in_greenlet
from ..errors import GivenBack, as_configuration_error
from ..interruptions import as_celerys
from ..pausing import pause, without_blocking
from ..request import Call, RequestRunner, begin_again, is_over, is_traced, request_of
from . import discarded, early, endings, sends
from .apart import warn_of_commits
from .chords import cut_claim
from .encoding import encode, is_unfinished, note_of
from .ended import ended_by, refuse_ended, returned
from .following import drop_next, store_next
from .ids import fix_links, key_of
from .pruning import Pruning
from .replacing import send_replacement
from .rows import Rows

logger: logging.Logger = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 1.0
GIVES_BACK_AFTER_S = 10.0
"""A copy that has waited so long for the one that runs gives its message back."""
WAITS_FOR_RESULT_S = 5.0
"""And so long for the result of one that has committed before its end."""
RUNS_FOR_S = 600.0
"""A task without a time limit that has committed, and not returned, is taken for lost after that."""
RUNS_AGAIN = 20
"""So often a body runs again at most, where the server rolls it back because of another transaction."""


class ExactlyOnceRunner(RequestRunner):
    """Runs the requests of one task that has `exactly_once`.

    Args:
        runner: Runs one attempt.
        rows: The table of the app's completed tasks.
        pruning: Deletes its old rows.
        mode: When the row is written.
        retries: `isolation_retries` of the task, where it has any.
    """

    def __init__(self, runner: RequestRunner, rows: Rows, pruning: Pruning, mode: Mode, retries: int = 0) -> None:
        super().__init__(runner.registry, runner.options, runner.hook_options)
        self._runner = runner
        self._rows, self._pruning = rows, pruning
        self._mode: Mode = mode
        self._retries = retries or RUNS_AGAIN

    def run(self, call: Call, task: Any, args: Any, kwargs: Any) -> Any:
        """Run `call`, the task's `run`, unless it is recorded."""
        request = request_of(task)
        if not is_traced(request) or request.is_eager:
            return self._runner.run(call, task, args, kwargs)
        key = key_of(request)
        fix_links(request, key)
        if request.chord is not None:
            endings.follow_members()  # not before: each task of the process pays for it
        record = self._look(key)
        reason = None if record is not None else discarded.why(task, request)
        if reason is not None:
            record = self._wait_or_revoke(task, request, key, reason)
        if record is not None:
            if ATTEMPT in request.__dict__:  # of the task's own `__call__`, whose unit of work goes on
                request.__dict__[ATTEMPT].over = True
            return self._repeat(task, request, key, record)
        conflicts, first = 0, True
        while True:
            attempt = self._attempt(task, request, key)
            last = conflicts >= self._retries
            outcome, value = self._run_once(attempt, call, task, request, args, kwargs, first=first, last=last)
            if outcome is _RETURNED:
                self._complete(attempt)
                self._pruning.recorded()
                return value
            if outcome is _RECORDED:
                attempt.over = True
                return self._repeat(task, request, key, value)
            if outcome is _CONFLICT:
                pause(_pause_s(conflicts))
                conflicts += 1
            first = False
            begin_again(task)

    def run_call(self, call: Call, task: Any, args: Any, kwargs: Any) -> Any:
        """Run the task's own `__call__`: the `run` that it calls is what is done once."""
        request = request_of(task)
        if not is_traced(request) or request.is_eager:
            return self._runner.run_call(call, task, args, kwargs)
        attempt = self._attempt(task, request, key_of(request))
        try:
            return self._runner.run_call(call, task, args, kwargs)
        except TaskPredicate as error:
            if attempt.committed or not (attempt.over or is_over(request)):  # its own, and not one of `run`
                endings.predicate(task, request, error, committed=attempt.committed)
            raise

    def run_hook(self, name: str, call: Call, task: Any, args: Any, kwargs: Any) -> Any:
        """Run a hook as without; `before_start` may end the request."""
        try:
            return super().run_hook(name, call, task, args, kwargs)
        except TaskPredicate as error:
            if name == "before_start":
                endings.predicate(task, request_of(task), error, committed=False)
            raise

    def inside(self, *args: Any, **kwargs: Any) -> Any:
        """Run hooks as without."""
        return self._runner.inside(*args, **kwargs)

    # -- one attempt -------------------------------------------------------------------------------------------------

    def _attempt(self, task: Any, request: Any, key: Key) -> Attempt:
        attempt: Attempt | None = request.__dict__.get(ATTEMPT)
        if attempt is not None:
            attempt.again()
        else:
            label = f"{task.name}[{request.id}]"
            needs = early.refusal(task, request)
            attempt = Attempt(key, task.name, self._rows.table, self._mode, label, needs, self._write)
            request.__dict__[ATTEMPT] = attempt
        return attempt

    def _run_once(
        self, attempt: Attempt, call: Call, task: Any, request: Any, args: Any, kwargs: Any, *, first: bool, last: bool
    ) -> tuple[object, Any]:
        """Return what became of one run of the body, and the result or the record that goes with it."""

        def body(*args: Any, **kwargs: Any) -> Any:
            sends.begin(request)
            result = call(*args, **kwargs)
            if inspect.iscoroutine(result):
                return _recorded(result, attempt, watch, task, request)
            _record(result, attempt, watch, task, request)
            return result

        watch = Watch()
        runner = type(self._runner)(self.registry, self.options, self.hook_options)
        runner.first = first
        runner.goes_on = functools.partial(_may_go_on, attempt, watch)
        try:
            value = runner.run(body, task, args, kwargs)
            if attempt.record is not None and attempt.record.note == SENT:
                drop_next(request)
            return _RETURNED, value
        except BaseException as error:
            if _is_overtaken(error):
                return self._lost(attempt, task, request)
            if isinstance(error, TaskPredicate):
                endings.predicate(task, request, error, committed=attempt.committed)
                self._write_end(attempt, error)
                raise
            if is_interrupt(error) and not (attempt.committed and isinstance(error, Exception)):
                raise  # its process ends; or its soft time limit has struck, and it is rolled back
            if attempt.committed:
                self._write_end(attempt, error)
                raise
            if attempt.lost is not None:  # the INSERT went along with the statement that says so
                return self._lost(attempt, task, request)
            record = self._look_quietly(attempt.key)
            if record is not None:
                logger.info("%s: another copy of it was first; this one ended with %r", attempt.label, error)
                return _RECORDED, record
            if last or not _may_pass(error) or watch.found() is not None:
                raise
            logger.info("%s lost its transaction to another one (%s); again", attempt.label, type(error).__name__)
            return _CONFLICT, None
        finally:
            watch.end()

    def _lost(self, attempt: Attempt, task: Any, request: Any) -> tuple[object, Any]:
        """Return what to do after another copy had the row: what it has recorded, or run again."""
        logger.info("%s: another copy of it runs, or has run", attempt.label)
        record = self._look(attempt.key)
        if record is None:
            record = self._wait(attempt, task, request)
        return (_AGAIN, None) if record is None else (_RECORDED, record)

    def _wait_or_revoke(self, task: Any, request: Any, key: Key, reason: str) -> Record:
        """Return what another delivery records that runs; without one, end `request`, which is not to begin."""
        record = None
        if self._rows.probe(key, task.name) is not None:
            record = self._wait(self._attempt(task, request, key), task, request)
        if record is None:
            discarded.revoke(task, request, reason)
        return record

    def _wait(self, attempt: Attempt, task: Any, request: Any) -> Record | None:
        """Wait, holding no connection, until the copy that has the row has ended; return what it has recorded, None
        where it has recorded nothing.

        Raises:
            GivenBack: that takes long: the message goes back to the broker, and the slot is free.
            Ignore: a time limit strikes, and the message is acknowledged already: the copy that runs goes on.
        """
        until, number = time.monotonic() + _patience_s(request), 0
        try:
            with _interruptible(task.name):
                while True:
                    pause(_pause_s(number))
                    number += 1
                    record = self._look(attempt.key)
                    if record is not None:
                        return record
                    if self._rows.probe(attempt.key, attempt.task) is None:
                        return None
                    if time.monotonic() > until and task.acks_late:
                        logger.info("%s: another copy of it still runs; the message goes back", attempt.label)
                        raise GivenBack("another copy of the task runs", requeue=True) from None
        except Exception as error:
            if isinstance(error, GivenBack) or not (is_interrupt(error) or isinstance(error, DBAPIError)):
                raise
            logger.info("%s: another copy of it runs, and waiting for that has ended: %r", attempt.label, error)
            if task.acks_late:
                raise GivenBack(error, requeue=True) from error
            raise Ignore from error

    # -- what is recorded --------------------------------------------------------------------------------------------

    def _look(self, key: Key) -> Record | None:
        try:
            return self._rows.look(key)
        except InvalidSetting:
            with as_configuration_error():
                raise

    def _look_quietly(self, key: Key) -> Record | None:
        """Look; where the database does not answer, the error that led here says more."""
        try:
            return self._rows.look(key)
        except SQLAlchemyError:
            return None

    def _repeat(self, task: Any, request: Any, key: Key, record: Record) -> Any:
        """Return what the task that is recorded has returned; send again what it was replaced by."""
        sends.repeats(request)
        redelivered = (request.delivery_info or {}).get("redelivered")
        logger.log(
            logging.INFO if redelivered else logging.WARNING,
            "%s[%s] has completed %.0f s ago and does not run again: what it returned then is its result. Where an id "
            "is used again on purpose, call db.forget(%r) first.",
            task.name, request.id, self._rows.age_s(record), request.id,
        )  # fmt: skip
        if is_unfinished(record):
            record = self._wait_for_result(task, request, key, record)
        without_blocking(functools.partial(cut_claim, task, request))
        if record.note == SENT:
            drop_next(request)
            if record.content_type == REPLACED:
                endings.ended(task, request)
                raise Ignore("Replaced by new task")
        refuse_ended(task, request, record)
        replacement = note_of(record).get(REPLACED)
        if replacement is not None:
            send_replacement(task, replacement)
            raise Ignore("Replaced by new task")
        return returned(task, request, record)

    def _wait_for_result(self, task: Any, request: Any, key: Key, record: Record) -> Record:
        until, number = time.monotonic() + min(WAITS_FOR_RESULT_S, _patience_s(request)), 0
        with _interruptible(task.name):
            while is_unfinished(record) and time.monotonic() < until:
                pause(_pause_s(number))
                number += 1
                record = self._look(key) or record
        if not is_unfinished(record):
            return record
        if self._rows.age_s(record) < _runs_for_s(request):
            if task.acks_late:
                raise GivenBack("the task has committed, and may still run", requeue=True)
            raise Ignore  # it is acknowledged already, and its result is that of the one that runs
        if early.needs_no_result(task, request):
            logger.warning("%s[%s] has committed, and was lost before it returned what nobody asks for",
                task.name, request.id)  # fmt: skip
            return Record()
        raise ResultLost(
            f"{task.name}[{request.id}] has exactly_once, and has called self.db.commit() before its end: what it has "
            f"committed is done, and is not done again. But it has not returned: its worker was lost, so its result is "
            f"not known. Leave self.db.commit() out, and the result is committed with the work."
        )

    def _complete(self, attempt: Attempt) -> None:
        """Record the result of a task that has committed before its end."""
        if attempt.committed and attempt.record is not None and attempt.written != attempt.record:
            self._write(attempt, attempt.record)

    def _write_end(self, attempt: Attempt, error: BaseException) -> None:
        """Record how a task that has committed before its end has ended; a result or a replacement that the row has
        already stays."""
        has_end = attempt.record is not None and (isinstance(error, TaskPredicate) or attempt.written == attempt.record)
        if attempt.committed and not has_end:
            self._write(attempt, ended_by(error))

    def _write(self, attempt: Attempt, record: Record) -> None:
        try:
            self._rows.complete(attempt.key, record)
        except SQLAlchemyError:
            logger.warning("%s: its end could not be recorded; a copy would not find it", attempt.label, exc_info=True)


_RETURNED, _RECORDED, _AGAIN, _CONFLICT = object(), object(), object(), object()


def _record(result: Any, attempt: Attempt, watch: Watch, task: Any, request: Any) -> None:
    """Note what the row is to say of a body that has returned `result`; write down what comes next."""
    warn_of_commits(attempt, watch, request)
    attempt.record = encode(task.app, result)
    if store_next(task, request, result):
        attempt.record = replace(attempt.record, note=SENT)


async def _recorded(coroutine: Awaitable[Any], attempt: Attempt, watch: Watch, task: Any, request: Any) -> Any:
    """Await the body of an `async def` task, in whose greenlet what follows may wait too."""
    result = await coroutine
    _record(result, attempt, watch, task, request)
    return result


def _is_overtaken(error: BaseException) -> bool:
    """Tell whether another copy has ended this run. What comes out of an `asyncio.TaskGroup` is a group of errors."""
    if isinstance(error, BaseExceptionGroup):
        return error.subgroup(Superseded) is not None
    return isinstance(error, Superseded)


@contextmanager
def _interruptible(name: str) -> Iterator[None]:
    """Let a time limit of an `async def` task strike in the block, which belongs to no body; of others it does."""
    interruption = current_interruption.get() if runs_in_greenlet() else None
    if interruption is None:
        yield
        return
    try:
        interruption.arm()
        yield
    except asyncio.CancelledError as error:
        raise as_celerys(error, name) from None
    finally:
        interruption.disarm()


def _may_go_on(attempt: Attempt, watch: Watch, error: BaseException | None) -> bool:
    if (error is not None and _is_overtaken(error)) or attempt.lost is not None:
        return True
    return error is not None and _may_pass(error) and watch.found() is None and not attempt.committed


def _may_pass(error: BaseException) -> bool:
    """Tell whether it may be another copy that `error` comes from, which holds what the body waited for."""
    return is_conflict(error) or is_lock_timeout(error)


def _pause_s(number: int) -> float:
    longest = min(FIRST_PAUSE_S * 2 ** min(number, 10), LONGEST_PAUSE_S)
    return random.uniform(longest / 2, longest)  # noqa: S311


def _runs_for_s(request: Any) -> float:
    """Return for how long a task that has committed may still run: its hard time limit, where it has one."""
    return float((request.timelimit or (None, None))[0] or RUNS_FOR_S)


def _patience_s(request: Any) -> float:
    """Return how long a copy waits: no longer than half its hard time limit, which would kill its process."""
    limit_s = (request.timelimit or (None, None))[0]
    return min(GIVES_BACK_AFTER_S, limit_s / 2) if limit_s else GIVES_BACK_AFTER_S
