"""Every invariant of the benchmark catches the breach it is there for, on a real ledger that is broken by hand."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from sqlalchemy import URL, NullPool, create_engine, text
from sqlalchemy.orm import Session

from celery_alchemy.loadtests.bench.checks import check_connections, check_tasks
from celery_alchemy.loadtests.bench.results import Verdict
from celery_alchemy.loadtests.bench.rows import UNANSWERED, TaskRow
from celery_alchemy.loadtests.services.databases import create_tables
from celery_alchemy.loadtests.tasks.models import Account, Entry
from celery_alchemy.loadtests.tasks.workloads import ACCOUNTS, WORKLOADS, Ending, Workload

TRANSFER, MIX, SELECT = WORKLOADS["transfer"], WORKLOADS["mix"], WORKLOADS["select"]
BALANCES = "every balance is explained by its ledger lines"
LINES = "every successful task has exactly its ledger lines"
TRACES = "no failed task left a ledger line"
OWN_TRANSACTION = "every task wrote in a transaction of its own"
TOTAL = "the total is conserved"
ENDED = "every task ended as it was meant to"
UNANSWERED_NAME = "every task was answered"


def row(number: int, **changed: object) -> TaskRow:
    whole = TaskRow(
        slice=0, arm="arm", workload="transfer", number=number, task_id=f"task-{number}", intended=1.0, sent=1.0,
        started=1.1, ended=1.2, outcome="success", attempts=1, checkout_ms=0.1, database_ms=0.5,
    )  # fmt: skip
    return replace(whole, **changed)  # type: ignore[arg-type]


def failed(verdicts: Sequence[Verdict]) -> set[str]:
    return {verdict.name for verdict in verdicts if not verdict.passed}


def check_ledger(url: URL, rows: Sequence[TaskRow], workload: Workload) -> list[Verdict]:
    return check_tasks(rows, workload, url).verdicts


def check_answers(rows: Sequence[TaskRow], workload: Workload | None) -> list[Verdict]:
    return check_tasks(rows, workload).verdicts


@pytest.fixture
def ledger(postgresql_server: URL, run_name: str, key: str) -> Iterator[URL]:
    """A database with accounts, and the transfers 0 to 4 booked, each in a transaction of its own."""
    name = f"{run_name}_ledger_{key}"
    engine = create_engine(postgresql_server, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f'CREATE DATABASE "{name}"')
    url = postgresql_server.set(database=name)
    try:
        create_tables(url, ACCOUNTS)
        for number in range(5):
            book(url, [number])
        yield url
    finally:
        with engine.connect() as connection:
            connection.exec_driver_sql(f'DROP DATABASE "{name}" WITH (FORCE)')
        engine.dispose()


def book(url: URL, numbers: Sequence[int], task_id: str = "") -> None:
    """Write what the transfers with these numbers write, all in one transaction."""
    engine = create_engine(url, poolclass=NullPool)
    with Session(engine) as session, session.begin():
        for number in numbers:
            for account_id, amount in TRANSFER.expected_entries(number):
                account = session.get_one(Account, account_id)
                account.balance += amount
                session.add(Entry(transfer_id=task_id or f"task-{number}", account_id=account_id, amount=amount))


def execute(url: URL, statement: str) -> None:
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        assert connection.execute(text(statement)).rowcount


def test_a_right_ledger_passes(ledger: URL) -> None:
    assert failed(check_ledger(ledger, [row(number) for number in range(5)], TRANSFER)) == set()


def test_a_lost_update_is_seen(ledger: URL) -> None:
    """The ledger lines are there, and a balance is not what they say: the money is conserved nowhere but in one sum."""
    (account, _), (other, _) = TRANSFER.expected_entries(0)
    execute(ledger, f"UPDATE account SET balance = balance + 1 WHERE id = {account}")
    execute(ledger, f"UPDATE account SET balance = balance - 1 WHERE id = {other}")
    assert failed(check_ledger(ledger, [row(number) for number in range(5)], TRANSFER)) == {BALANCES}


def test_a_balance_out_of_nothing_is_seen(ledger: URL) -> None:
    execute(ledger, "UPDATE account SET balance = balance + 1 WHERE id = 1")
    assert failed(check_ledger(ledger, [row(number) for number in range(5)], TRANSFER)) == {TOTAL, BALANCES}


def test_a_success_without_its_rows_is_seen(ledger: URL) -> None:
    assert failed(check_ledger(ledger, [row(number) for number in range(6)], TRANSFER)) == {LINES, OWN_TRANSACTION}


def test_a_success_that_wrote_twice_is_seen(ledger: URL) -> None:
    book(ledger, [4])
    assert failed(check_ledger(ledger, [row(number) for number in range(5)], TRANSFER)) == {LINES, OWN_TRANSACTION}


def test_a_failed_task_whose_rows_stayed_is_seen(ledger: URL) -> None:
    rows = [*(row(number) for number in range(4)), row(4, outcome="failure", error_type="OperationalError")]
    assert failed(check_ledger(ledger, rows, TRANSFER)) == {TRACES, ENDED}


def test_rows_of_a_task_that_nobody_sent_are_seen(ledger: URL) -> None:
    assert failed(check_ledger(ledger, [row(number) for number in range(4)], TRANSFER)) == {TRACES}


def test_an_unanswered_task_may_have_written_or_not(ledger: URL) -> None:
    rows = [*(row(number) for number in range(4)), *(row(number, outcome=UNANSWERED) for number in (4, 5))]
    assert failed(check_ledger(ledger, rows, TRANSFER)) == {UNANSWERED_NAME}


def test_two_tasks_in_one_transaction_are_seen(ledger: URL) -> None:
    """Their rows and balances are right; had one of them failed, both would have been lost."""
    book(ledger, [5, 6])
    verdicts = check_ledger(ledger, [row(number) for number in range(7)], TRANSFER)
    assert failed(verdicts) == {OWN_TRANSACTION}
    (detail,) = (verdict.detail for verdict in verdicts if not verdict.passed)
    assert "task-5 and task-6" in detail


def test_a_task_in_two_transactions_is_seen(ledger: URL) -> None:
    """Half of it was committed by another task, and would have stayed if the rest had failed."""
    (account, _), _ = TRANSFER.expected_entries(0)
    execute(ledger, f"UPDATE entry SET amount = amount WHERE transfer_id = 'task-0' AND account_id = {account}")
    assert failed(check_ledger(ledger, [row(number) for number in range(5)], TRANSFER)) == {OWN_TRANSACTION}


def test_a_task_that_only_reads_may_leave_nothing(ledger: URL) -> None:
    rows = [row(number, workload="select") for number in range(5)]
    assert LINES in failed(check_ledger(ledger, rows, SELECT))


def test_answers_are_counted() -> None:
    assert failed(check_answers([row(1), row(2)], TRANSFER)) == set()
    assert failed(check_answers([row(1), row(2, outcome=UNANSWERED)], TRANSFER)) == {"every task was answered"}
    assert failed(check_answers([row(1), row(2, finals=2)], TRANSFER)) == {"no task was answered twice"}


def test_endings_are_compared_with_what_was_meant() -> None:
    wrong = row(1, outcome="failure", error_type="OperationalError", error="gone")
    (detail,) = (verdict.detail for verdict in check_answers([row(0), wrong], TRANSFER) if not verdict.passed)
    assert detail == "1 times, as in: OperationalError: gone"

    raising = next(number for number in range(10) if MIX.ending(number) is Ending.RAISE)
    retrying = next(number for number in range(10) if MIX.ending(number) is Ending.RETRY)
    refused = row(raising, outcome="failure", error_type="TransferRefused")
    assert failed(check_answers([refused, row(retrying, attempts=2)], MIX)) == set()
    assert failed(check_answers([row(raising)], MIX)) == {ENDED}
    assert failed(check_answers([replace(refused, error_type="OperationalError")], MIX)) == {ENDED}
    assert failed(check_answers([row(retrying, attempts=1)], MIX)) == {ENDED}


def test_a_shared_session_is_a_breach() -> None:
    assert failed(check_answers([row(1)], TRANSFER)) == set()
    found = check_answers([row(1), row(2, breach="its Session is in use by another task")], TRANSFER)
    (verdict,) = (one for one in found if not one.passed)
    assert verdict.name == "every task had a Session of its own"
    assert "in use by another task" in verdict.detail


@pytest.mark.parametrize(
    ("facts", "names"),
    [
        ((4, 4, 0, None), set()),
        ((5, 4, 0, None), {"never more connections than promised"}),
        ((4, 4, 1, None), {"no connection was left idle in transaction"}),
        # Who did not look cannot say that a promise was broken.
        ((9, 4, 0, "gone"), set()),
        ((99, None, 0, None), set()),
    ],
)
def test_connections_are_compared_with_the_promise(
    facts: tuple[int, int | None, int, str | None], names: set[str]
) -> None:
    assert failed(check_connections(*facts)) == names


def test_what_could_not_be_checked_is_said() -> None:
    for verdicts in (check_connections(9, 4, 0, "gone"), check_connections(9, None, 0, None)):
        assert [verdict.detail for verdict in verdicts if verdict.detail.startswith("not checked: ")]


def test_the_tasks_that_went_wrong_are_named(ledger: URL) -> None:
    """Each once, however much is wrong with it; one without an answer is not known to be wrong."""
    rows = [
        row(0),
        row(1, finals=2, breach="its Session is in use by another task"),
        row(2, outcome="failure", error_type="OperationalError"),
        row(3, outcome=UNANSWERED),
        row(4),
        row(5),
    ]
    assert check_tasks(rows, TRANSFER, ledger).wrong == {"task-1", "task-2", "task-5"}
    book(ledger, [6, 7])
    assert check_tasks([*rows, row(6), row(7)], TRANSFER, ledger).wrong >= {"task-6", "task-7"}
