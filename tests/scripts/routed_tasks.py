"""Tasks of the tests' project whose Session goes to one of two Engines of this module, which celery-alchemy was never
told of. Both are used at import, so that the main process has connections of theirs when it forks."""

import os
from typing import Any

from sqlalchemy import Delete, Insert, Update, create_engine, literal, select
from sqlalchemy.orm import Session
from support.project.app import app, config
from support.project.models import Row

from celery_alchemy import Alchemy

writer = create_engine(config["database_url"])
reader = create_engine(config["database_url"])


class Routing(Session):
    def get_bind(self, mapper: Any = None, *, clause: Any = None, **keywords: Any) -> Any:
        return writer if self._flushing or isinstance(clause, Insert | Update | Delete) else reader


routed = Alchemy(app, database="routed", session_factory=Routing)


def work(session: Session, key: str, note: str) -> dict[str, Any]:
    """Ask five questions, write a row; return the process and whether all answers were right."""
    asked = [f"{note} {number}" for number in range(5)]
    answers = [session.scalar(select(literal(one))) for one in asked]
    session.add(Row(key=key, note=note))
    session.flush()
    return {"pid": os.getpid(), "right": answers == asked}


with Routing() as early:
    work(early, "import", "import")
    early.commit()


@app.task
def route(key: str, note: str) -> dict[str, Any]:
    """With a Session of the task's own."""
    with Routing() as session, session.begin():
        return work(session, key, note)


@app.task
def route_in_unit(key: str, note: str) -> dict[str, Any]:
    """With the Session of a unit of work of ours, whose Engine routes past the one we made."""
    with routed.unit_of_work() as session:
        return work(session, key, note)
