"""A bank: accounts, and the ledger that must always explain their balances."""

from __future__ import annotations

from sqlalchemy import BigInteger, ForeignKey, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from ...strategies.features.completed_table import completed_tasks_table

INITIAL_BALANCE = 1_000_000
"""What each account starts with: never used up in a run, so that a transfer fails only when it is meant to."""


class Base(DeclarativeBase):
    """The tables of one run."""


completed_tasks_table(Base.metadata)


class Account(Base):
    """A balance that only transfers change."""

    __tablename__ = "account"

    id: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int] = mapped_column(BigInteger, default=INITIAL_BALANCE)


class Entry(Base):
    """One line of the ledger; a transfer writes two, which add up to nothing.

    No unique constraint on the transfer: lines written twice must be seen by the invariants, not refused.
    """

    __tablename__ = "entry"

    id: Mapped[int] = mapped_column(primary_key=True)
    transfer_id: Mapped[str] = mapped_column(String(64), index=True)
    account_id: Mapped[int] = mapped_column(ForeignKey("account.id"))
    amount: Mapped[int] = mapped_column(BigInteger)
