"""The tables. Views and tasks use the same models, and the same `db.session`."""

from sqlalchemy.orm import Mapped, mapped_column

from .extensions import Base


class User(Base):
    __tablename__ = "shop_users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Welcome(Base):
    __tablename__ = "shop_welcomes"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    saw_user: Mapped[bool]
