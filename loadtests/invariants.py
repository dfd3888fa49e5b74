"""What must hold after every run, whatever the speed: each check asks the database, or counts the answers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import URL, create_engine, text
from sqlalchemy.pool import NullPool

from .load import Answered, LoadResult
from .models import INITIAL_BALANCE

EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Check:
    """One invariant, and whether it held."""

    name: str
    passed: bool
    detail: str = ""
    """What was found instead, if it did not hold."""


@dataclass(frozen=True, slots=True)
class ConnectionFacts:
    """What was seen of the worker's connections, besides the ledger."""

    peak: int
    announced: int | None
    """The most connections the worker said it would open; None if it knows no bound."""
    idle_in_transaction: int
    """After the last answer."""
    left_after_stop: int
    sampling_error: str | None = None


def check_answers(load: LoadResult) -> list[Check]:
    """Check that each transfer was answered once, and ended as it was meant to."""
    unanswered = [answered.transfer.id for answered in load.answered.values() if not answered.final]
    repeated = [answered.transfer.id for answered in load.answered.values() if len(answered.final) > 1]
    failures: dict[str, list[str]] = defaultdict(list)
    for answered in load.answered.values():
        if failure := answered.failure:
            failures[failure.partition(":")[0]].append(failure)
    return [
        Check("every transfer was answered", not unanswered, _some(unanswered)),
        Check(
            "no transfer was answered twice, no unknown one",
            not repeated and not load.strangers,
            f"{_some(repeated)}; {load.strangers} unknown",
        ),
        Check(
            "every transfer ended as it was meant to",
            not failures,
            "; ".join(f"{len(alike)} times, as in: {alike[0]}" for alike in failures.values()),
        ),
    ]


def check_ledger(database: URL, load: LoadResult) -> list[Check]:
    """Check balances and ledger against the answers, in plain SQL, on a connection of its own."""
    engine = create_engine(database, poolclass=NullPool)
    try:
        with engine.connect() as connection:
            balances = [(row[0], row[1]) for row in connection.execute(text("SELECT id, balance FROM account"))]
            rows = connection.execute(text("SELECT transfer_id, account_id, amount FROM entry")).all()
    finally:
        engine.dispose()
    lines: dict[str, list[tuple[int, int]]] = defaultdict(list)
    booked: Counter[int] = Counter()
    for transfer_id, account_id, amount in rows:
        lines[transfer_id].append((account_id, amount))
        booked[account_id] += amount
    total = sum(balance for _, balance in balances)
    unexplained = [number for number, balance in balances if balance != INITIAL_BALANCE + booked[number]]
    succeeded = [answered for answered in load.answered.values() if answered.succeeded]
    failed = [answered for answered in load.answered.values() if answered.final and not answered.succeeded]
    wrong = [answered.transfer.id for answered in succeeded if not _booked_once(answered, lines[answered.transfer.id])]
    traces = [answered.transfer.id for answered in failed if lines.get(answered.transfer.id)]
    unknown = [transfer_id for transfer_id, found in lines.items() if found and transfer_id not in load.answered]
    expected_total = INITIAL_BALANCE * len(balances)
    return [
        Check("the total is conserved", total == expected_total, f"{total} instead of {expected_total}"),
        Check("every balance is explained by its ledger lines", not unexplained, f"accounts {_some(unexplained)}"),
        Check("every successful transfer has exactly its two ledger lines", not wrong, _some(wrong)),
        Check("no failed transfer left a ledger line", not traces and not unknown, _some(traces + unknown)),
    ]


def check_connections(facts: ConnectionFacts, load: LoadResult) -> list[Check]:
    """Check that connections were given back, and never more open than announced."""
    kept = _kept_connections(load)
    bounded = facts.announced is None or facts.peak <= facts.announced
    return [
        Check(
            "no connection was left idle in transaction",
            facts.idle_in_transaction == 0,
            f"{facts.idle_in_transaction} connections",
        ),
        Check("nothing was left checked out", not kept, f"by pool process: {kept}"),
        Check(
            "never more connections than the worker announced",
            bounded and facts.sampling_error is None,
            facts.sampling_error or f"{facts.peak} instead of {facts.announced}",
        ),
        Check("no connection outlived the worker", facts.left_after_stop == 0, f"{facts.left_after_stop} connections"),
    ]


def _booked_once(answered: Answered, found: list[tuple[int, int]]) -> bool:
    transfer = answered.transfer
    return sorted(found) == sorted([(transfer.source, -transfer.amount), (transfer.target, transfer.amount)])


def _kept_connections(load: LoadResult) -> dict[int, int]:
    """Return how many connections each pool process kept at the end, for those that kept any.

    Each reply says what is checked out right after its task, when others may still run. Nothing runs any more at the
    last reply of a process.
    """
    replies = [reply for answered in load.answered.values() for reply in answered.replies]
    last = {reply.pid: reply.checked_out for reply in sorted(replies, key=lambda reply: reply.ended)}
    return {pid: kept for pid, kept in last.items() if kept}


def _some(items: Iterable[object]) -> str:
    """Return how many there are, and the first few."""
    found = [str(item) for item in items]
    return f"{len(found)}: {', '.join(found[:EXAMPLES])}{', ...' if len(found) > EXAMPLES else ''}" if found else "0"
