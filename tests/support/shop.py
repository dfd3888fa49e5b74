"""A small application with a broker in memory, for tests that send and need no worker."""

from pathlib import Path
from typing import Any

from celery import Celery
from sqlalchemy import create_engine

from celery_alchemy import Alchemy, DatabaseTask

from .project.models import Base


class Shop:
    """An app, its database in a file, and what was sent through a broker in memory."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self.app = Celery("shop", broker="memory://", set_as_current=False)
        self.app.conf.update(alchemy_database_url=f"sqlite:///{path}", task_default_queue=str(path), **settings)
        self.db = Alchemy(self.app)
        self.ran: list[str] = []
        self.engine = create_engine(f"sqlite:///{path}")
        Base.metadata.create_all(self.engine)

        @self.app.task(base=DatabaseTask, bind=True, shared=False)
        def rename(task: Any, name: str) -> str:
            self.ran.append(name)
            return str(task.request.id)

        self.rename = rename

    def sent(self) -> list[Any]:
        """Return the ids of the messages that have arrived since the last look."""
        return [message.headers["id"] for message in self.messages()]

    def messages(self) -> list[Any]:
        """Return the messages that have arrived since the last look."""
        found = []
        with (
            self.app.connection_for_read() as connection,
            connection.SimpleQueue(self.app.conf.task_default_queue) as q,
        ):
            while True:
                try:
                    message = q.get(block=False)
                except q.Empty:
                    return found
                message.ack()
                found.append(message)

    def close(self) -> None:
        self.db.stop()
        self.engine.dispose()
        self.app.close()
