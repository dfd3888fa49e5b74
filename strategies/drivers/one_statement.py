"""Which texts may be sent together with BEGIN."""

from __future__ import annotations

import re

#: COPY is none of these: it leaves the protocol of a pipeline in a state that nothing recovers from.
_ORDINARY = re.compile(r"[\s(]*(?:SELECT|INSERT|UPDATE|DELETE|MERGE|WITH|VALUES|SAVEPOINT|LOCK|SET|CALL)\b", re.I)


def is_one_statement(query: object) -> bool:
    """Tell whether `query` is a text with one ordinary statement, as far as a look at it can tell.

    The extended protocol of PostgreSQL refuses a text with several, which the simple one allows. Not every such text is
    recognised (a semicolon may stand in a literal, a comment may come first): it then gets a BEGIN of its own.
    """
    if not isinstance(query, str) or _ORDINARY.match(query) is None:
        return False
    return ";" not in query or ";" not in query.rstrip("; \t\r\n")
