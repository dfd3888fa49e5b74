"""The web pages, and the command that creates the tables."""

from flask import Blueprint, abort
from sqlalchemy import select

from .extensions import db
from .models import User, Welcome
from .tasks import welcome

blueprint = Blueprint("shop", __name__, cli_group=None)


@blueprint.post("/users/<name>")
def create_user(name: str) -> str:
    welcome.delay_on_commit(name)  # before the first statement, or after: it is sent when the view commits
    db.session.add(User(name=name))
    db.session.flush()
    if name.startswith("bad"):
        db.session.rollback()
        abort(400)
    db.session.commit()
    return name


@blueprint.get("/users")
def list_users() -> dict[str, list[str]]:
    return {
        "users": list(db.session.scalars(select(User.name).order_by(User.id))),
        "welcomed": list(db.session.scalars(select(Welcome.name).order_by(Welcome.id))),
        "too_early": list(db.session.scalars(select(Welcome.name).where(~Welcome.saw_user))),
    }


@blueprint.cli.command("create-tables")
def create_tables() -> None:
    db.create_all()
