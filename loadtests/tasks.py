"""Money transfers, ending in every way that a transaction has to survive."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session, scoped_session

from celery_alchemy import DatabaseTask

from .app import app, db
from .models import Account, Entry

SLOW_S = 0.05
"""How long a slow transfer keeps its two rows locked, in seconds."""


class TransferRefused(Exception):
    """The failure that some transfers are meant to end with, after they have written."""


def book(session: Session | scoped_session[Session], transfer_id: str, source: int, target: int, amount: int) -> None:
    """Move `amount` between two accounts, both locked in the order of their ids, and write two ledger lines."""
    accounts = session.scalars(
        select(Account)
        .where(Account.id.in_((source, target)))
        # One order for all: two opposite transfers that lock in their own order wait for each other for ever.
        .order_by(Account.id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    for account in accounts:
        change = amount if account.id == target else -amount
        account.balance += change
        session.add(Entry(transfer_id=transfer_id, account_id=account.id, amount=change))
    session.flush()


@app.task(base=DatabaseTask, bind=True)
def transfer(self: DatabaseTask, source: int, target: int, amount: int) -> None:
    """Return normally: committed for the task."""
    book(self.db, self.request.id, source, target, amount)


@app.task(base=DatabaseTask, bind=True)
def transfer_committed(self: DatabaseTask, source: int, target: int, amount: int) -> None:
    """Commit explicitly, as the classic recipe does, through the proxy that code down the call stack uses."""
    book(db.session, self.request.id, source, target, amount)
    self.db.commit()


@app.task(base=DatabaseTask, bind=True)
def transfer_slow(self: DatabaseTask, source: int, target: int, amount: int) -> None:
    """Keep the server busy in the middle of the transaction."""
    book(self.db, self.request.id, source, target, amount)
    sleep = func.pg_sleep if self.db.get_bind().dialect.name == "postgresql" else func.sleep
    self.db.execute(select(sleep(SLOW_S)))


@app.task(base=DatabaseTask, bind=True, throws=(TransferRefused,))
def transfer_refused(self: DatabaseTask, source: int, target: int, amount: int) -> None:
    """Raise after writing: nothing of it may stay."""
    book(self.db, self.request.id, source, target, amount)
    raise TransferRefused(f"{amount} from {source} to {target}")


@app.task(base=DatabaseTask, bind=True)
def transfer_retried(self: DatabaseTask, source: int, target: int, amount: int) -> None:
    """Write, then retry at once: only what the second attempt writes may stay."""
    book(self.db, self.request.id, source, target, amount)
    if self.request.retries == 0:
        raise self.retry(countdown=0)
