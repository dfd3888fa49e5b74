"""What an app asks of a database, beside its URL."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy.engine import URL


@dataclass(frozen=True, slots=True)
class DatabaseOptions:
    """Settings of the app that an Engine or its Sessions have to know of."""

    database: str = "default"
    """The name of the database."""
    databases: int = 1
    """How many the app has."""
    two_phase: bool = False
    """They commit all or none, and this one can."""
    statement_timeout_s: float | None = None
    """The server stops a statement that takes longer; None: as the server is configured."""
    application_name: bool = False
    """The server shows which task a transaction is of."""

    external_pooler: bool = False
    """A pooler between gives each transaction any of the server's connections (PgBouncer in transaction mode): nothing
    may be set for a session, and no statement prepared for one."""
    begin_with_first_statement: bool | Literal["auto"] = "auto"
    """BEGIN goes with the first statement of a transaction; "auto": where that is worth it."""
    reset_on_return: bool = False
    """What the server keeps of a session is set back when its connection goes back to the connection pool."""
    engine_options: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Keyword arguments of `create_engine` that the user gave."""
    replica_url: URL | None = field(default=None, repr=False)
    """Where units of work read that are read-only; None: where the others do."""
    reads: bool = False
    """The Engine is for `read_only=True`: each statement commits itself."""

    @property
    def timeout_in_transactions(self) -> bool:
        """The statement timeout is set for each transaction, not for each connection."""
        return self.external_pooler and self.statement_timeout_s is not None

    @property
    def sets_in_transactions(self) -> bool:
        """There is something to be set when a transaction begins."""
        return self.application_name or self.timeout_in_transactions

    @property
    def options_setting(self) -> str:
        """The setting that the options of the Engine come from, for messages."""
        if self.database == "default":
            return "alchemy_engine_options"
        return f"alchemy_databases[{self.database!r}]['engine_options']"
