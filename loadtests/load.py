"""A bounded load of money transfers: what to send, sending it, and what came back."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from celery import Celery

from .environment import WorkerEnvironment
from .replies import Outcome, Reply, ReplyList

MAX_AMOUNT = 100


class Kind(StrEnum):
    """The way a transfer is meant to end; the value is the task's name."""

    PLAIN = "celery_alchemy.loadtests.tasks.transfer"
    COMMITTED = "celery_alchemy.loadtests.tasks.transfer_committed"
    SLOW = "celery_alchemy.loadtests.tasks.transfer_slow"
    REFUSED = "celery_alchemy.loadtests.tasks.transfer_refused"
    RETRIED = "celery_alchemy.loadtests.tasks.transfer_retried"


MIX = {Kind.PLAIN: 6, Kind.COMMITTED: 1, Kind.SLOW: 1, Kind.REFUSED: 1, Kind.RETRIED: 1}
"""How many of each ten transfers are of each kind."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """One task to send."""

    id: str
    """The task's id, and what it writes into the ledger."""
    kind: Kind
    source: int
    target: int
    amount: int


@dataclass(frozen=True, slots=True)
class Answered:
    """A transfer that was sent, and every reply to it."""

    transfer: Transfer
    sent: float
    """`time.monotonic()` before it was published."""
    replies: list[Reply] = field(default_factory=list)

    @property
    def final(self) -> list[Reply]:
        """The replies that ended it: one, if all is well."""
        return [reply for reply in self.replies if reply.outcome is not Outcome.RETRY]

    @property
    def succeeded(self) -> bool:
        """Whether the worker says that it was committed."""
        return any(reply.outcome is Outcome.SUCCESS for reply in self.replies)

    @property
    def failure(self) -> str | None:
        """What is wrong with its ending, given its kind; None if it ended as meant or not at all."""
        for reply in self.final:
            refused = reply.outcome is Outcome.FAILURE and reply.error_type == "TransferRefused"
            if self.transfer.kind is Kind.REFUSED and not refused:
                return f"{reply.outcome} instead of TransferRefused"
            if self.transfer.kind is not Kind.REFUSED and reply.outcome is Outcome.FAILURE:
                return f"{reply.error_type}: {reply.error}"
            attempts = len(self.replies)
            if attempts != (2 if self.transfer.kind is Kind.RETRIED else 1):
                return f"{attempts} attempts"
        return None


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Everything one load sent and got back."""

    answered: dict[str, Answered]
    strangers: int
    """Replies to tasks this load did not send."""
    seconds: float
    """From the first transfer sent to the last one ended."""

    @property
    def latencies_ms(self) -> list[float]:
        """Sent to ended, of the successful transfers: a fast error must not make a worker look fast."""
        return [
            (reply.ended - answered.sent) * 1000
            for answered in self.answered.values()
            for reply in answered.final
            if reply.outcome is Outcome.SUCCESS
        ]


def plan(count: int, accounts: int, seed: int = 1) -> list[Transfer]:
    """Return `count` transfers between accounts 1 to `accounts`, the same for every worker pool but for their ids."""
    rng = random.Random(seed)  # noqa: S311 - reproducible, not secret.
    deck = [kind for kind, share in MIX.items() for _ in range(share)]
    kinds = [deck[number % len(deck)] for number in range(count)]
    rng.shuffle(kinds)
    transfers = []
    for kind in kinds:
        source, target = rng.sample(range(1, accounts + 1), 2)
        transfers.append(Transfer(uuid.uuid4().hex, kind, source, target, rng.randint(1, MAX_AMOUNT)))
    return transfers


class Client:
    """A Celery app that only sends."""

    def __init__(self, environment: WorkerEnvironment) -> None:
        self._app: Any = Celery("celery-alchemy-load", set_as_current=False)
        self._app.conf.update(environment.celery_settings())

    def send(self, transfer: Transfer) -> None:
        """Publish one transfer."""
        arguments = (transfer.source, transfer.target, transfer.amount)
        self._app.send_task(transfer.kind.value, arguments, task_id=transfer.id)

    def close(self) -> None:
        """Close the connections to the broker."""
        self._app.close()


def drive(
    client: Client,
    replies: ReplyList,
    transfers: Sequence[Transfer],
    *,
    in_flight: int,
    send_s: float,
    answer_s: float,
    alive: Callable[[], bool],
    progress: Callable[[int], None] = lambda _: None,
) -> LoadResult:
    """Keep `in_flight` transfers with the worker until all are answered.

    Args:
        send_s: Stop sending after this time, however many are left.
        answer_s: Give up on transfers that are still unanswered this long after any reply.
        alive: Whether the worker still runs; if not, there is nothing to wait for.
        progress: Called with the number of transfers ended so far.
    """
    answered: dict[str, Answered] = {}
    queue = list(reversed(transfers))
    strangers = ended = 0
    started = last_reply = time.monotonic()
    last_end = started
    while True:
        now = time.monotonic()
        while queue and now < started + send_s and len(answered) - ended < in_flight:
            transfer = queue.pop()
            answered[transfer.id] = Answered(transfer, time.monotonic())
            client.send(transfer)
        if ended >= len(answered) or now > last_reply + answer_s:
            break
        for message in replies.pop(timeout_s=0.25):
            reply = Reply.from_json(message)
            last_reply = time.monotonic()
            if reply.task_id not in answered:
                strangers += 1
                continue
            first_end = not answered[reply.task_id].final
            answered[reply.task_id].replies.append(reply)
            if reply.outcome is not Outcome.RETRY:
                ended += first_end
                last_end = max(last_end, reply.ended)
        progress(ended)
        if not alive() and time.monotonic() > last_reply + 1:
            break
    return LoadResult(answered, strangers, last_end - started)
