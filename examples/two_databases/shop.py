"""No web framework, two databases: a task reads orders in one and writes a report into the other, both or none.

pip install "../..[postgresql]" "celery[redis]"
celery -A shop worker --loglevel=INFO
python -m shop ada
python -m shop --own-session grace
"""

import os
import sys
from typing import Annotated

from celery import Celery
from sqlalchemy import func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_alchemy import Alchemy, CurrentSession, DatabaseTask, UseDatabase

URL = "postgresql+psycopg://localhost"

app = Celery("shop", broker=os.environ.get("SHOP_BROKER", "redis://localhost"))
app.conf.alchemy_databases = {
    "default": os.environ.get("SHOP_DATABASE_URL", f"{URL}/shop"),
    "reports": {
        "url": os.environ.get("SHOP_REPORTS_URL", f"{URL}/reports"),
        "engine_options": {"pool_size": 1},
    },
}
db = Alchemy(app)
reports = Alchemy(app, database="reports")

Reports = Annotated[Session, UseDatabase("reports")]


class Base(DeclarativeBase):
    """The tables of the database "default"."""


class ReportsBase(DeclarativeBase):
    """The tables of the database "reports"."""


class User(Base):
    __tablename__ = "shop_users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Welcome(ReportsBase):
    __tablename__ = "shop_welcomes"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    saw_user: Mapped[bool]
    users: Mapped[int]


@app.task(base=DatabaseTask)
def welcome(name: str, session: CurrentSession, there: Reports) -> None:
    user = session.scalars(select(User).where(User.name == name)).first()
    count = session.scalar(select(func.count()).select_from(User)) or 0
    there.add(Welcome(name=name, saw_user=user is not None, users=count))
    # Returning commits both databases.


def create_user(name: str, session: Session) -> None:
    welcome.delay_on_commit(name)
    session.add(User(name=name))
    session.flush()
    if name.startswith("bad"):
        raise ValueError(f"{name} is no good name")


def main(arguments: list[str]) -> None:
    Base.metadata.create_all(db.engine)
    ReportsBase.metadata.create_all(reports.engine)
    if arguments[0] == "--own-session":
        with Session(db.engine) as session, db.follow(session):
            create_user(arguments[1], session)
            session.commit()  # and now the task is sent
    else:
        with db.unit_of_work() as session:
            create_user(arguments[0], session)
        # committed at the end of the block, and sent


if __name__ == "__main__":
    main(sys.argv[1:] or sys.exit("usage: python -m shop [--own-session] NAME"))
