"""What a copy returns is what the first delivery has returned, however the app encodes results."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from celery.result import AsyncResult
from kombu import serialization
from support.exactly_once import Once, Place, fixture_of, new_id
from support.project.models import Row

from celery_alchemy import ConfigurationError, DatabaseTask
from celery_alchemy.workers.exactly_once import choosing

place = fixture_of(["postgresql", "mariadb"])
BACKENDS = pytest.mark.parametrize("backend", ["cache+memory://", "alchemy://"])


@pytest.fixture(autouse=True)
def serializers() -> Iterator[None]:
    """Serializers as apps register them: one writes bytes, one a text that not every database keeps."""
    serialization.register("utf8", _in_utf8, json.loads, "application/x-utf8", "utf-8")
    serialization.register("noisy", "noisy:{}\0😀".format, _as_bytes, "application/x-noisy", "utf-8")
    yield
    serialization.unregister("utf8")
    serialization.unregister("noisy")


def _in_utf8(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8")


def _as_bytes(value: bytes) -> bytes:
    assert isinstance(value, bytes), "what came of a text, which a Redis backend gives as bytes"
    return value


def app_of(place: Place, serializer: str, **settings: Any) -> Once:
    settings = {"result_serializer": serializer, "result_accept_content": [serializer], **settings}
    return Once(place[0], **place[1], **settings)


def returning(once: Once, value: Any, **options: Any) -> Any:
    @once.app.task(base=DatabaseTask, bind=True, exactly_once=True, **options)
    def work(self: Any, key: str) -> Any:
        self.db.add(Row(key=key))
        return value

    return work


@BACKENDS
def test_a_text_that_the_serializer_does_not_take_is_refused_before_the_commit(
    place: Place, key: str, backend: str
) -> None:
    """It was committed with None as its result, and failed then, or not even that; a copy succeeded with None."""
    once = app_of(place, "utf8", result_backend=backend)
    try:
        half, task_id = returning(once, "half \ud83d", name="half"), new_id()
        for _ in range(2):
            state, error = once.deliver(half, key, task_id=task_id)
            assert (state, type(error).__name__) == ("FAILURE", "UnencodableResult")
        assert [row for row in once.recorded(task_id) if row[0] >= 0] == []
        assert once.database.rows(key) == []
        assert once.deliver(returning(once, "whole 😀", name="whole"), key, task_id=task_id) == ("SUCCESS", "whole 😀")
    finally:
        once.close()


@BACKENDS
@pytest.mark.parametrize("serializer", ["json", "yaml", "pickle"])
def test_a_result_that_is_one_of_celerys(place: Place, key: str, backend: str, serializer: str) -> None:
    """Celery stores what names it; a copy returned None."""
    once = app_of(place, serializer, result_backend=backend)
    try:
        work, task_id = returning(once, AsyncResult("another", app=once.app)), new_id()
        found = []
        for _ in range(2):
            assert once.deliver(work, key, task_id=task_id)[0] == "SUCCESS"
            once.app.backend._cache.clear()
            found.append(AsyncResult(task_id, app=once.app).result)
            once.app.backend.delete(once.app.backend.get_key_for_task(task_id))  # the copy's is stored anew
        assert found[0] == found[1]
        assert "another" in str(found[0])
    finally:
        once.close()


@pytest.mark.parametrize(("serializer", "result"), [("utf8", "é😀\0"), ("noisy", "noisy:é\0😀".encode())])
def test_a_serializer_of_the_apps_own(place: Place, key: str, serializer: str, result: Any) -> None:
    once = app_of(place, serializer, result_backend="disabled://")
    try:
        work, task_id = returning(once, "é😀\0" if serializer == "utf8" else "é"), new_id()
        assert once.deliver(work, key, task_id=task_id)[0] == "SUCCESS"
        assert once.deliver(work, key, task_id=task_id) == ("SUCCESS", result)
        assert once.database.rows(key) == [""]
    finally:
        once.close()


def test_a_row_that_was_written_with_another_serializer(place: Place, key: str) -> None:
    """It is read where that runs no code. Else a copy says what it lacks, unless nobody reads the result."""
    task_ids = {}
    for serializer in ("yaml", "pickle"):
        before = app_of(place, serializer, result_backend="disabled://")
        task_ids[serializer] = new_id()
        before.deliver(returning(before, {"a": 1}, name="work"), key, task_id=task_ids[serializer])
        before.close()
    once = app_of(place, "json")
    try:
        work = returning(once, "again", name="work")
        assert once.deliver(work, key, task_id=task_ids["yaml"]) == ("SUCCESS", {"a": 1})
        assert once.deliver(work, key, task_id=task_ids["pickle"], ignore_result=True) == ("SUCCESS", None)
        state, error = once.deliver(work, key, task_id=task_ids["pickle"])
        assert (state, type(error).__name__) == ("FAILURE", "ResultLost")
        assert "add its serializer to result_accept_content" in str(error)
        assert once.database.rows(key) == ["", ""]
    finally:
        once.close()


@pytest.mark.parametrize(("accepts", "is_right"), [(["json"], False), (["json", "pickle"], True)])
def test_a_worker_that_would_not_read_its_own_results_does_not_start(
    place: Place, accepts: list[str], is_right: bool
) -> None:
    once = app_of(place, "pickle", result_accept_content=accepts)
    try:
        returning(once, None)
        once.app.finalize()
        if is_right:
            choosing.prepare_worker(once.app, once.db.settings)
        else:
            with pytest.raises(ConfigurationError, match="Add 'pickle' to result_accept_content"):
                choosing.prepare_worker(once.app, once.db.settings)
    finally:
        once.close()
