"""The ways to give a task its Session that the benchmark compares: ours, and what people write by hand.

Names and summaries only, for whoever reports on them; a worker imports the one module that it runs.
"""

from __future__ import annotations

from dataclasses import dataclass

OURS = "celery-alchemy"
POOLS = ("prefork", "threads", "gevent", "eventlet", "solo")
DEFAULT_CONNECTIONS = 15
"""SQLAlchemy's default connection pool: 5 kept open, and 10 more when all are in use."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """One way to give a task its Session."""

    name: str
    summary: str
    """One sentence for people."""
    pools: tuple[str, ...] = POOLS
    """The worker pools under which it is what its name says."""
    connections_per_process: int | None = DEFAULT_CONNECTIONS
    """The most connections that one process opens; None: as many as tasks run."""

    @property
    def module(self) -> str:
        """The module that defines its tasks."""
        return f"{__name__}.{self.name.replace('-', '_')}"


PATTERNS: dict[str, Pattern] = {
    pattern.name: pattern
    for pattern in (
        Pattern(OURS, "self.db of a DatabaseTask: one Session per task request, committed when the task returns."),
        Pattern(
            "recipe", "The published DatabaseTask: the Session is an attribute of the Task, closed in after_return."
        ),
        Pattern("with_session", "with Session(engine) in each task, on one Engine made when the module is imported."),
        Pattern(
            "null_pool",
            "with Session(engine) in each task, on an Engine that opens a connection for each (NullPool).",
            connections_per_process=None,
        ),
        Pattern(
            "process_init",
            "with Session(engine) in each task, on an Engine made in each pool process by worker_process_init.",
            pools=("prefork", "solo"),
        ),
        Pattern("thread_local", "A scoped_session with SQLAlchemy's thread-local registry, removed after each task."),
        Pattern("global_session", "One Session for all tasks of the process."),
        Pattern("flask", "Flask-SQLAlchemy's db.session, in an application context around each task."),
    )
}
"""By name, ours first."""
