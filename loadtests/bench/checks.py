"""What must hold after every load, whatever the speed: each check asks the database, or counts the answers."""

from __future__ import annotations

import signal
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import URL, Connection, create_engine, text
from sqlalchemy.pool import NullPool

from ..models import INITIAL_BALANCE
from ..replies import Outcome
from ..rows import UNANSWERED, TaskRow
from ..sampler import Observer
from ..worker import Worker
from ..workloads import Ending, Workload
from .results import Verdict

EXAMPLES = 3
END_S = 3.0
"""How long a server may take to notice that a client is gone."""


@dataclass(frozen=True, slots=True)
class ConnectionFacts:
    """What was seen of one cell's connections."""

    peak: int
    promised: int | None
    """The most connections the worker said it would open; None if it knows no bound."""
    idle_in_transaction: int
    """After the last answer."""
    sampling_error: str | None = None
    """Why nobody looked all the time; None if somebody did."""


@dataclass(frozen=True, slots=True)
class _Line:
    account: int
    amount: int
    transaction: str
    """The number of the transaction that wrote it, where the database tells."""


def failure(row: TaskRow, workload: Workload | None) -> str | None:
    """Return what is wrong with how a task ended, given what it was meant to do; None if nothing, or if it never ended.

    Args:
        workload: None for a task of somebody else's, which is meant to succeed.
    """
    if row.outcome == UNANSWERED:
        return None
    if wanted := workload.expected_error(row.number) if workload else "":
        failed_so = row.outcome == Outcome.FAILURE and row.error_type == wanted
        return None if failed_so else f"{row.error_type or row.outcome} instead of {wanted}"
    if row.outcome == Outcome.FAILURE:
        return f"{row.error_type}: {row.error}"
    expected = 2 if workload and workload.ending(row.number) is Ending.RETRY else 1
    if workload and row.attempts != expected:
        return f"{row.attempts} attempts instead of {expected}"
    return None


def check_answers(rows: Sequence[TaskRow], workload: Workload | None) -> list[Verdict]:
    """Check that each task was answered once, and ended as it was meant to."""
    unanswered = [row.task_id for row in rows if row.outcome == UNANSWERED]
    repeated = [row.task_id for row in rows if row.finals > 1]
    failures: defaultdict[str, list[str]] = defaultdict(list)
    for row in rows:
        if wrong := failure(row, workload):
            failures[wrong.partition(":")[0]].append(wrong)
    return [
        _verdict("every task was answered", unanswered),
        _verdict("no task was answered twice", repeated),
        _holds(
            "every task ended as it was meant to",
            not failures,
            "; ".join(f"{len(alike)} times, as in: {alike[0]}" for alike in failures.values()),
        ),
    ]


def check_sessions(rows: Sequence[TaskRow]) -> list[Verdict]:
    """Check that each task had a Session for itself, with no other task's transaction in it."""
    seen: defaultdict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.breach:
            # The words before the colon are the kind of breach.
            seen[row.breach.partition(":")[0]].append(row.breach)
    return [
        _holds(
            "every task had a Session of its own",
            not seen,
            "; ".join(f"{len(alike)} times, as in: {alike[0]}" for alike in seen.values()),
        )
    ]


def check_ledger(database: URL, rows: Sequence[TaskRow], workload: Workload) -> list[Verdict]:
    """Check balances, ledger and transactions against the answers, in plain SQL, on a connection of its own."""
    engine = create_engine(database, poolclass=NullPool)
    try:
        with engine.connect() as connection:
            balances = [(row[0], row[1]) for row in connection.execute(text("SELECT id, balance FROM account"))]
            lines = _ledger(connection)
            knows_transactions = connection.dialect.name == "postgresql"
    finally:
        engine.dispose()
    booked: Counter[int] = Counter()
    for found in lines.values():
        for line in found:
            booked[line.account] += line.amount
    known = {row.task_id for row in rows}
    succeeded = [row for row in rows if row.succeeded]
    total, expected_total = sum(balance for _, balance in balances), INITIAL_BALANCE * len(balances)
    unexplained = [number for number, balance in balances if balance != INITIAL_BALANCE + booked[number]]
    wrong = [
        row.task_id
        for row in succeeded
        if sorted((line.account, line.amount) for line in lines.get(row.task_id, ()))
        != workload.expected_entries(row.number)
    ]
    traces = [row.task_id for row in rows if row.outcome == Outcome.FAILURE and lines.get(row.task_id)]
    strangers = [task_id for task_id in lines if task_id not in known]
    return [
        _holds("the total is conserved", total == expected_total, f"{total} instead of {expected_total}"),
        _verdict("every balance is explained by its ledger lines", unexplained, "accounts "),
        _verdict("every successful task has exactly its ledger lines", wrong),
        _verdict("no failed task left a ledger line", traces + strangers),
        _check_transactions(succeeded, lines, workload, knows_transactions),
    ]


def _check_transactions(
    succeeded: Sequence[TaskRow], lines: dict[str, list[_Line]], workload: Workload, known: bool
) -> Verdict:
    name = "every task wrote in a transaction of its own"
    if not known:
        return Verdict(name, True, "not checked: only PostgreSQL says which transaction wrote a row")
    split, writers = [], defaultdict[str, set[str]](set)
    for row in succeeded:
        transactions = {line.transaction for line in lines.get(row.task_id, ())}
        if len(transactions) != workload.transactions:
            split.append(f"{row.task_id} in {len(transactions)}")
        for transaction in transactions:
            writers[transaction].add(row.task_id)
    shared = [" and ".join(sorted(tasks)) for tasks in writers.values() if len(tasks) > 1]
    return _verdict(name, [*split, *shared])


def check_connections(facts: ConnectionFacts) -> list[Verdict]:
    """Check that connections were given back, and never more open than promised."""
    promise = "never more connections than promised"
    unchecked = facts.sampling_error or ("none promised" if facts.promised is None else "")
    return [
        _holds(
            "no connection was left idle in transaction",
            facts.idle_in_transaction == 0,
            f"{facts.idle_in_transaction} connections",
        ),
        Verdict(promise, True, f"not checked: {unchecked}")
        if facts.promised is None or facts.sampling_error
        else _holds(promise, facts.peak <= facts.promised, f"{facts.peak} instead of {facts.promised}"),
    ]


def stop(worker: Worker) -> Verdict:
    """Stop a worker, in bounded time, and say whether it did when it was told to."""
    process, died = worker.process, not worker.alive
    process.stop()
    clean = not died and process.ended_by is signal.SIGTERM and process.exit_code == 0
    how = "by itself" if died or process.ended_by is None else f"by {process.ended_by.name}"
    return _holds("the worker stopped when it was told to", clean, f"it ended {how}, with code {process.exit_code}")


def check_end(observer: Observer, database: str) -> Verdict:
    """Check that no connection outlived the worker, which is gone."""
    left = observer.settle(database, total=0, within_s=END_S).total
    return _holds("no connection outlived the worker", not left, f"{left} connections")


def _ledger(connection: Connection) -> dict[str, list[_Line]]:
    # xmin is the transaction that wrote the row: it tells at no cost to the load who committed together.
    transaction = "CAST(xmin AS text)" if connection.dialect.name == "postgresql" else "''"
    rows = connection.execute(text(f"SELECT transfer_id, account_id, amount, {transaction} FROM entry"))  # noqa: S608
    lines: defaultdict[str, list[_Line]] = defaultdict(list)
    for task_id, account, amount, number in rows:
        lines[task_id].append(_Line(account, amount, number))
    return dict(lines)


def _holds(name: str, passed: bool, detail: str) -> Verdict:
    return Verdict(name, passed, "" if passed else detail)


def _verdict(name: str, offenders: Iterable[object], what: str = "") -> Verdict:
    """Return a verdict that holds if there are no offenders, and otherwise says how many, and the first few."""
    found = [str(offender) for offender in offenders]
    shown = f"{', '.join(found[:EXAMPLES])}{', ...' if len(found) > EXAMPLES else ''}"
    return Verdict(name, not found, f"{what}{len(found)}: {shown}" if found else "")
