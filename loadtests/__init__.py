"""Real workers under load: services, a worker starter, workloads, checks, a benchmark, and users for Locust.

Importing this imports no Locust, which monkey-patches the process: `CeleryUser` and `ArrivalUser` are imported when a
locustfile asks for them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client.users import ArrivalUser, CeleryUser

__all__ = ["ArrivalUser", "CeleryUser"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .client import users

    return getattr(users, name)
