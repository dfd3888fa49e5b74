"""The examination: everything the doctor looks at, in order; what cannot be looked at is left out, and said."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from celery import Celery

from ...strategies.worker_pool import WorkerPool
from .. import apps
from ..crossing import on_their_loop
from ..databases import check_two_phase
from ..errors import ConfigurationError
from ..extension import Alchemy
from ..starting import asynchronous
from ..starting.checks import refuse_mistakes
from ..task import DatabaseTask
from .code import files_of, tasks_of
from .configuration import look_at_settings
from .connected import look_at_servers
from .findings import LEVELS, Finding, Level, error
from .fleet import Demand, Fleet, judge
from .reading.project import POOLS, read_files
from .servers import Server
from .static import read


@dataclass(slots=True)
class Diagnosis:
    """What was found, and what it was found of."""

    worker_pool: WorkerPool
    strategies: dict[str, str] = field(default_factory=dict)
    """Of each database, the line that the worker logs at its start."""
    demands: list[Demand] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def of(self, level: Level) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == level]


def examine(app: Celery, *, pool: str | None, concurrency: int | None, fleet: Fleet, connect: bool) -> Diagnosis:
    """Examine `app` as a worker with this pool would run it; one connection to each server, and nothing is written.

    Args:
        pool: Of the worker; None: as the setting worker_pool says.
        connect: Ask the servers too.
    """
    app.loader.import_default_modules()
    app.finalize()
    worker_pool = _worker_pool(app, pool, concurrency)
    diagnosis = Diagnosis(worker_pool)
    db = apps.find(app)
    databases = _start(app, db, worker_pool, diagnosis)
    if databases:
        diagnosis.strategies = {name: one.strategy.describe() for name, one in databases.items()}
        diagnosis.demands = [_demand(name, one, worker_pool, fleet) for name, one in databases.items()]
        diagnosis.findings += look_at_settings(app, databases, worker_pool)
        servers: dict[str, Server] = {}
        if connect:
            diagnosis.findings += on_their_loop(
                databases.values(), lambda: list(look_at_servers(app, databases, servers))
            )
        diagnosis.findings += judge(diagnosis.demands, servers)
    diagnosis.findings += _look_at_code(app, list((databases or {}).values()), worker_pool)
    diagnosis.findings.sort(key=lambda finding: (LEVELS.index(finding.level), finding.code, finding.where))
    return diagnosis


def _look_at_code(app: Celery, alchemies: list[Alchemy], worker_pool: WorkerPool) -> list[Finding]:
    """Read the project's source files, with what only the app knows."""
    settings: dict[str, object] = {}
    if alchemies:
        servers = [db for db in alchemies if db.strategy.engines.url.get_backend_name() != "sqlite"]
        kept = [db for db in servers if not db.settings.reset_on_return]
        settings["alchemy_enqueue_on_commit"] = any(db.settings.enqueue_on_commit for db in alchemies)
        settings["alchemy_on_commit_outside"] = alchemies[0].settings.on_commit_outside
        settings["alchemy_reset_on_return"] = not kept
        settings["alchemy_commit_on_success"] = alchemies[0].settings.commit_on_success
    shares = any(db.shared for db in alchemies) if alchemies else None
    project = read_files(files_of(app))
    return read(project, app.main or "the app", pools={worker_pool.name}, settings=settings, shares=shares).findings


def _worker_pool(app: Celery, pool: str | None, concurrency: int | None) -> WorkerPool:
    name = pool or app.conf.worker_pool
    name = name if name in POOLS else "prefork" if name in {"processes", None} else "custom"
    count = concurrency or app.conf.worker_concurrency or os.cpu_count() or 2
    return WorkerPool(name=name, concurrency=1 if name == "solo" else count)


def _start(app: Celery, db: Alchemy | None, worker_pool: WorkerPool, diagnosis: Diagnosis) -> dict[str, Alchemy] | None:
    """Choose the strategies as a worker does; None where a worker would not start, or has no database."""
    if db is None:
        if any(isinstance(task, DatabaseTask) for task in tasks_of(app).values()):
            diagnosis.findings.append(
                error("no-alchemy", f"Tasks want a Session, but {apps.explain_none(app)}", "db = Alchemy(app)")
            )
        return None
    try:
        db.start_worker(worker_pool)
        databases = db.databases
        for one in databases.values():
            if one is not db:
                one.start_worker(worker_pool)
        asynchronous.start(app, databases, worker_pool)
        check_two_phase(databases)
        refuse_mistakes(app, databases)
    except ConfigurationError as refused:
        diagnosis.findings.append(
            error("configuration", f"A worker does not start: {refused}", "See the message.", "the settings")
        )
        return None
    reads = any(getattr(task, "read_only", False) is True for task in tasks_of(app).values())
    for one in databases.values():
        one.strategy.reads_apart = reads
    return dict(databases)


def _demand(name: str, db: Alchemy, worker_pool: WorkerPool, fleet: Fleet) -> Demand:
    processes = worker_pool.process_count + (1 if worker_pool.forks else 0)
    most = db.strategy.max_connections
    return Demand(name, None if most is None else most // processes, processes, fleet.total)
