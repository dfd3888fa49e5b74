"""A statement that travels with another one, or with the COMMIT, so that it has no round trip of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


class Along:
    """A statement that a connection is to send along.

    Args:
        query: In the driver's own style, with named parameters.
        is_wanted: Tells whether it is still to be sent: the transaction that it is for may be over.
        failed: Is called with the driver's error where the text failed that it was sent in.
    """

    __slots__ = ("_is_wanted", "failed", "query", "sent", "values")
    failed: Callable[[BaseException], object]
    query: str
    values: Mapping[str, Any]

    def __init__(
        self,
        query: str,
        values: Mapping[str, Any],
        is_wanted: Callable[[Along], bool],
        failed: Callable[[BaseException], object],
    ) -> None:
        self.query, self.values, self.failed, self._is_wanted = query, values, failed, is_wanted
        self.sent: bool = False

    def is_due(self) -> bool:
        """Tell whether it is to be sent now."""
        return not self.sent and self._is_wanted(self)
