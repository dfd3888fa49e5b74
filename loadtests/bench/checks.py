"""What must hold after every load, whatever the speed: each check asks the database, or counts the answers."""

from __future__ import annotations

import signal
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import URL, create_engine, text
from sqlalchemy.pool import NullPool

from ..services.harness import Worker
from ..tasks.models import INITIAL_BALANCE
from ..tasks.replies import Outcome
from ..tasks.workloads import Ending, Workload
from .results import Verdict
from .rows import UNANSWERED, TaskRow

ANSWERED, ONCE = "every task was answered", "no task was answered twice"
ENDED = "every task ended as it was meant to"
OWN_SESSION = "every task had a Session of its own"
TOTAL, BALANCES = "the total is conserved", "every balance is explained by its ledger lines"
LINES = "every successful task has exactly its ledger lines"
TRACES = "no failed task left a ledger line"
OWN_TRANSACTION = "every task wrote in a transaction of its own"
IDLE, PROMISE = "no connection was left idle in transaction", "never more connections than promised"
STOPPED, OUTLIVED = "the worker stopped when it was told to", "no connection outlived the worker"


class Breach(NamedTuple):
    """What one task, or the database, did wrong."""

    name: str  # Of the verdict that it breaks
    text: str  # A task's id, or a sentence; what stands before its colon is the kind of breach
    task_id: str = ""


class _Line(NamedTuple):
    account: int
    amount: int
    transaction: str  # The number of the transaction that wrote it, where the database tells


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found out about the tasks of a load."""

    verdicts: list[Verdict]
    wrong: set[str]  # Ids of the answered tasks of which anything does not hold


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


def check_tasks(rows: Sequence[TaskRow], workload: Workload | None, database: URL | None = None) -> Checked:
    """Check that each task was answered once, ended as it was meant to, and had a Session of its own.

    Args:
        database: Where the tasks of a workload wrote: compare the ledger with the answers too.
    """
    names, breaches = [ANSWERED, ONCE, ENDED, OWN_SESSION], list(_answers(rows, workload))
    unchecked: list[Verdict] = []
    if database is not None and workload is not None:
        names += [TOTAL, BALANCES, LINES, TRACES]
        breaches += _ledger(database, rows, workload)
        if database.get_backend_name() == "postgresql":
            names.append(OWN_TRANSACTION)
        else:
            reason = "not checked: only PostgreSQL says which transaction wrote a row"
            unchecked.append(Verdict(OWN_TRANSACTION, True, reason))
    found: defaultdict[str, list[Breach]] = defaultdict(list)
    for breach in breaches:
        found[breach.name].append(breach)
    unanswered = {breach.task_id for breach in found[ANSWERED]}
    wrong = {breach.task_id for breach in breaches} - unanswered - {""}
    return Checked([Verdict(name, not found[name], _said(found[name])) for name in names] + unchecked, wrong)


def _said(breaches: Sequence[Breach]) -> str:
    """Return how often each kind of breach occurred, with an example; tasks that only have an id are of one kind."""
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for breach in breaches:
        kinds[breach.text.partition(":")[0] if breach.text != breach.task_id else ""].append(breach.text)
    return "; ".join(f"{len(alike)} times, as in: {alike[0]}" for alike in kinds.values())


def _answers(rows: Iterable[TaskRow], workload: Workload | None) -> Iterator[Breach]:
    for row in rows:
        if row.outcome == UNANSWERED:
            yield Breach(ANSWERED, row.task_id, row.task_id)
        if row.finals > 1:
            yield Breach(ONCE, row.task_id, row.task_id)
        if wrong := failure(row, workload):
            yield Breach(ENDED, wrong, row.task_id)
        if row.breach:
            yield Breach(OWN_SESSION, row.breach, row.task_id)


def _ledger(database: URL, rows: Sequence[TaskRow], workload: Workload) -> Iterator[Breach]:
    """Compare balances, ledger lines and transactions with the answers."""
    balances, lines = _read(database)
    booked: Counter[int] = Counter()
    for found in lines.values():
        for line in found:
            booked[line.account] += line.amount
    total, expected_total = sum(balances.values()), INITIAL_BALANCE * len(balances)
    if total != expected_total:
        yield Breach(TOTAL, f"{total} instead of {expected_total}")
    for account, balance in balances.items():
        if balance != INITIAL_BALANCE + booked[account]:
            yield Breach(BALANCES, f"account: {account}")
    writers: defaultdict[str, set[str]] = defaultdict(set)
    for row in rows:
        written = lines.get(row.task_id, [])
        if row.succeeded:
            if sorted(line[:2] for line in written) != workload.expected_entries(row.number):
                yield Breach(LINES, row.task_id, row.task_id)
            transactions = {line.transaction for line in written}
            if len(transactions) != workload.transactions:
                yield Breach(OWN_TRANSACTION, f"split: {row.task_id} in {len(transactions)}", row.task_id)
            for transaction in transactions:
                writers[transaction].add(row.task_id)
        elif row.outcome == Outcome.FAILURE and written:
            yield Breach(TRACES, row.task_id, row.task_id)
    known = {row.task_id for row in rows}
    yield from (Breach(TRACES, f"sent by nobody: {task_id}") for task_id in lines if task_id not in known)
    for tasks in writers.values():
        if len(tasks) > 1:
            yield from (Breach(OWN_TRANSACTION, f"shared: {' and '.join(sorted(tasks))}", task_id) for task_id in tasks)


def _read(database: URL) -> tuple[dict[int, int], dict[str, list[_Line]]]:
    """Return the balances by account, and the ledger lines by task; in plain SQL, on a connection of its own."""
    engine = create_engine(database, poolclass=NullPool)
    # xmin is the transaction that wrote the row: it tells at no cost to the load who committed together.
    transaction = "CAST(xmin AS text)" if engine.dialect.name == "postgresql" else "''"
    lines: defaultdict[str, list[_Line]] = defaultdict(list)
    with engine.connect() as connection:
        balances = {row[0]: row[1] for row in connection.execute(text("SELECT id, balance FROM account"))}
        found = connection.execute(text(f"SELECT transfer_id, account_id, amount, {transaction} FROM entry"))  # noqa: S608
        for task_id, *line in found:
            lines[task_id].append(_Line(*line))
    return balances, lines


def check_connections(peak: int, promised: int | None, idle_in_transaction: int, unseen: str | None) -> list[Verdict]:
    """Check that connections were given back, and never more open than promised.

    Args:
        promised: The most connections the worker said it would open; None if it knows no bound.
        idle_in_transaction: After the last answer.
        unseen: Why nobody looked all the time; None if somebody did.
    """
    if unchecked := unseen or ("none promised" if promised is None else ""):
        kept = Verdict(PROMISE, True, f"not checked: {unchecked}")
    else:
        assert promised is not None
        kept = _holds(PROMISE, peak <= promised, f"{peak} instead of {promised}")
    return [_holds(IDLE, not idle_in_transaction, f"{idle_in_transaction} connections"), kept]


def stop(worker: Worker) -> Verdict:
    """Stop a worker, in bounded time, and say whether it did when it was told to."""
    process, died = worker.process, not worker.alive
    process.stop()
    clean = not died and process.ended_by is signal.SIGTERM and process.exit_code == 0
    how = "by itself" if died or process.ended_by is None else f"by {process.ended_by.name}"
    return _holds(STOPPED, clean, f"it ended {how}, with code {process.exit_code}")


def outlived(left: int) -> Verdict:
    """Judge the connections that are left of a worker that is gone."""
    return _holds(OUTLIVED, not left, f"{left} connections")


def _holds(name: str, passed: bool, detail: str) -> Verdict:
    return Verdict(name, passed, "" if passed else detail)
