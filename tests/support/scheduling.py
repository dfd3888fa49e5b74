"""Which tests pytest-xdist keeps in one process: those that share a worker, or a module's fixtures.

Its own marker does not do it: with pytest 9.2, pytest-xdist 3.8 sets an attribute that pytest no longer reads.
"""

import re
from pathlib import PurePosixPath

from xdist.scheduler import LoadScopeScheduling

_PAIR = re.compile(
    r"[\[-]((?:local|scoped|per_process|per_loop)-(?:prefork|threads|gevent|eventlet|solo|asyncio))[\]-]"
)


def group_of(nodeid: str) -> str:
    """Return the pair of strategy and worker pool of a contract test, or the module of another test."""
    module = PurePosixPath(nodeid.partition("::")[0]).stem
    pair = _PAIR.search(nodeid) if module.startswith("test_contract_") else None
    return pair[1] if pair else module


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Give each group to one process."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)
