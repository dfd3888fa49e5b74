"""Strategies of third parties."""

from celery_alchemy import LocalStrategy, ScopedStrategy, WorkerPool


class HouseStrategy(LocalStrategy):
    name = "house"


class SoloOnlyStrategy(ScopedStrategy):
    """Serves one worker pool only, and says so."""

    name = "solo_only"

    @classmethod
    def refuses(cls, worker_pool: WorkerPool) -> str | None:
        return None if worker_pool.name == "solo" else "it was written for solo"
