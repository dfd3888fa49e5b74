"""The tasks. They need no application context for `db.session`."""

from sqlalchemy import select

from celery_alchemy import DatabaseTask

from .extensions import app, db
from .models import User, Welcome


@app.task(base=DatabaseTask)
def welcome(name: str) -> None:
    user = db.session.scalars(select(User).where(User.name == name)).first()
    db.session.add(Welcome(name=name, saw_user=user is not None))
