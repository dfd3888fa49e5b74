"""Tasks that leave something on the server's side of their connection, and tasks that look for it."""

from typing import Any

from sqlalchemy import text

from support.project.app import task


@task(max_retries=1)
def leave(self: Any, statements: list[str], end: str) -> None:
    """Execute statements, then return, raise, or retry once."""
    for statement in statements:
        self.db.execute(text(statement.replace(":", r"\:")))
    if end == "raise":
        raise ValueError("with all of it left")
    if end == "retry" and self.request.retries == 0:
        raise self.retry(countdown=0)


@task
def look(self: Any, questions: list[str]) -> list[Any]:
    return [self.db.execute(text(question.replace(":", r"\:"))).scalar() for question in questions]
