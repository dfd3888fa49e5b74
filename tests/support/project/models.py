"""Tables of the project; SQLAlchemy only, so that the test process can create them."""

from sqlalchemy import ForeignKeyConstraint, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from celery_alchemy import completed_tasks_table, outbox_table


class Base(DeclarativeBase):
    pass


class Row(Base):
    """What a task wrote: `key` belongs to one test, `note` says which part of the task wrote it."""

    __tablename__ = "rows_"

    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column("key_", String(64), index=True)
    note: Mapped[str] = mapped_column(String(200), default="")


class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)


class Counter(Base):
    __tablename__ = "counters"

    key: Mapped[str] = mapped_column("key_", String(64), primary_key=True)
    value: Mapped[int] = mapped_column(default=0)


class Child(Base):
    """A row whose foreign key PostgreSQL checks at COMMIT only."""

    __tablename__ = "children"
    __table_args__ = (
        ForeignKeyConstraint(["parent_id"], ["users.id"], deferrable=True, initially="DEFERRED").ddl_if(
            dialect="postgresql"
        ),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int]


outbox = outbox_table(Base.metadata)
completed = completed_tasks_table(Base.metadata)
