"""Our errors come back from the result backend as what they were: class, message, SQLAlchemy's classes above it."""

import copy
import json
import pickle
import subprocess
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import exc, text
from support.apps import make_app
from support.databases import PostgreSQL
from support.worker import Site, Worker

import celery_alchemy
from celery_alchemy import (
    BrokenTransaction,
    CeleryAlchemyError,
    DatabaseTask,
    NoUnitOfWork,
    TransientDatabaseError,
    is_transient,
)

CONFLICT = "DO $$ BEGIN RAISE EXCEPTION 'of two' USING ERRCODE = '40001'; END $$"
SERIALIZERS = pytest.mark.parametrize("serializer", ["json", "pickle"])


def all_of(kind: type[Exception]) -> Iterator[type[Exception]]:
    yield kind
    for narrower in kind.__subclasses__():
        if narrower.__module__.startswith(celery_alchemy.__name__):
            yield from all_of(narrower)


OURS = sorted(set(all_of(CeleryAlchemyError)), key=lambda kind: kind.__name__)


def settings(site: Site, serializer: str) -> dict[str, Any]:
    return {
        "result_backend_transport_options": {"global_keyprefix": site.prefix},
        "result_serializer": serializer,
        "result_expires": None,  # redis-py calls the command for it deprecated, and the keys go with this run
        "accept_content": ["json", "pickle"],
    }


def client(site: Site, serializer: str = "json") -> Celery:
    app = Celery("client", broker="memory://", backend=site.urls.celery, set_as_current=False)
    app.conf.update(settings(site, serializer))
    return app


def come_back(app: Celery, error: Exception) -> Exception:
    """Store `error` as the result of a task, and return what its client gets."""
    task_id = uuid.uuid4().hex
    app.backend.store_result(task_id, error, "FAILURE", traceback="")
    with pytest.raises(Exception) as raised:
        app.AsyncResult(task_id).get(timeout=10)
    return raised.value


@SERIALIZERS
@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_each_of_our_errors(site: Site, serializer: str, kind: type[Exception]) -> None:
    error = kind("what happened: a value, and the remedy")
    found = come_back(client(site, serializer), error)
    for one in (found, pickle.loads(pickle.dumps(found)), copy.copy(found), come_back(client(site, serializer), found)):
        assert type(one) is kind
        assert one.args == error.args
        assert str(one) == str(error)
        assert "what happened: a value, and the remedy" in str(one)
        assert repr(one) == repr(error)
        assert is_transient(one) == issubclass(kind, TransientDatabaseError)


def test_they_are_found_where_a_client_looks() -> None:
    """All but those that only a worker's start raises are there once one name is imported."""
    looked_for = {kind.__module__ for kind in OURS} - {"celery_alchemy.workers.errors"}
    script = "import sys; from celery_alchemy import TransientDatabaseError; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=250, check=True)
    assert looked_for <= set(done.stdout.split())
    assert len(OURS) > 12


@SERIALIZERS
@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_what_a_database_has_said(site: Site, run_database: PostgreSQL, driver: str, serializer: str) -> None:
    app, db = make_app(run_database.url("results", driver=driver))
    app.conf.update(settings(site, serializer), task_store_eager_result=True, result_backend=site.urls.celery)

    @app.task(base=DatabaseTask, bind=True, name="conflict")
    def conflict(self: Any, swallows: bool) -> None:
        try:
            self.db.execute(text(CONFLICT))
        except exc.OperationalError:
            if not swallows:
                raise

    for swallows in (False, True):
        eager = conflict.apply((swallows,))
        with pytest.raises(TransientDatabaseError) as raised:
            app.AsyncResult(eager.id).get(timeout=10)
        found = raised.value
        assert type(found) is type(eager.result)
        assert isinstance(found, BrokenTransaction if swallows else exc.OperationalError)
        assert found.args == eager.result.args
        assert "of two" in str(found)
    db.stop()


def test_from_a_worker(site: Site, worker: Worker, key: str) -> None:
    app = client(site)
    ids = {task: worker.send(task, key) for task in ("lose_a_conflict", "plain")}
    for task_id in ids.values():
        worker.wait(task_id)
    with pytest.raises(TransientDatabaseError, match="of two") as raised:
        app.AsyncResult(ids["lose_a_conflict"]).get(timeout=10)
    assert isinstance(raised.value, exc.OperationalError)
    stored = json.loads(site.redis.get(f"{site.prefix}celery-task-meta-{ids['lose_a_conflict']}") or "{}")
    assert stored["result"]["exc_type"] == "TransientOperationalError"
    with pytest.raises(NoUnitOfWork):
        app.AsyncResult(ids["plain"]).get(timeout=10)
