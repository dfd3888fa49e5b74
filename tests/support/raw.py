"""What the tests of lost work need of a Session."""

from typing import Any

from sqlalchemy.orm import Session


def raw_of(session: Session) -> Any:
    return session.connection().connection.dbapi_connection
