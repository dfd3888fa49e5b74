"""A strategy that has become dearer: it looks at each statement."""

from typing import Any

from sqlalchemy import Engine, event

from celery_alchemy import LocalStrategy


class ListeningStrategy(LocalStrategy):
    name = "listening"

    def make_engine(self) -> Engine:
        engine = super().make_engine()
        event.listen(engine, "before_cursor_execute", _look)
        return engine


def _look(*_: Any) -> None:
    """Nothing: SQLAlchemy's calling it is what costs."""
