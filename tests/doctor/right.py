"""Nothing is wrong here."""

import os
from typing import Annotated

from celery import Celery, signals
from sqlalchemy import String, create_engine, insert
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_alchemy import Alchemy, CurrentSession, DatabaseTask, TransientDatabaseError, UseDatabase

app = Celery("shop", broker="redis://localhost")
app.conf.alchemy_database_url = os.environ["DOCTOR_URL"]
app.conf.update(task_acks_late=True, task_reject_on_worker_lost=True)

reports_engine = create_engine(os.environ["DOCTOR_URL"], pool_size=3, max_overflow=0)
db = Alchemy(app)
reports = Alchemy(app, database="reports", engine=reports_engine)
seen: set[str] = set()


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(64))


class Counting(DatabaseTask):
    """A base of our own that keeps what may be kept."""

    abstract = True

    def __init__(self):
        self.started = {}

    def on_success(self, retval, task_id, args, kwargs):
        self.db.add(User(name=task_id))
        self.db.commit()


@app.task(base=Counting, bind=True, autoretry_for=(TransientDatabaseError,))
def create(self: DatabaseTask, name: str) -> None:
    self.db.add(User(name=name))
    welcome.delay_on_commit(name)
    db.on_commit(lambda: welcome.delay(name))


@app.task(base=DatabaseTask)
def import_users(names: list[str], session: CurrentSession) -> None:
    for name in names:
        session.add(User(name=name))
        session.commit()
        seen.add(name)
        welcome.delay(name)


@app.task(base=DatabaseTask, bind=True, enqueue_on_commit=True)
def welcome(self: DatabaseTask, name: str) -> None:
    seen.add(name)
    import_users.delay([name])
    with db.unit_of_work() as session:
        session.execute(insert(User).values(name=name))
    import_users.delay([name])


@app.task(base=DatabaseTask, bind=True)
def rename(self: DatabaseTask, name: str) -> None:
    self.db.add(User(name=name))
    welcome.delay(name)  # the task waits by itself


@app.task(base=DatabaseTask)
def report(there: Annotated[Session, UseDatabase("reports")]) -> None:
    there.add(User(name="x"))


@signals.task_postrun.connect
def note(task_id, **_) -> None:
    with db.unit_of_work() as session:
        session.add(User(name=task_id))
