"""A task that replaces itself: its row says by what, and a copy sends that again.

The replacement has the same id, one level of nesting deeper, and a row of its own.
"""

from __future__ import annotations

import json
from typing import Any

from kombu.utils import json as kombu_json

from ...strategies.features.completed import REPLACED, Record
from ..sending.celerys_own import sent_by_celery


def record_of(signature: Any) -> Record:
    """Return the Record of a task that is replaced by `signature`."""
    note: str = kombu_json.dumps({REPLACED: kombu_json.dumps(dict(signature))})
    json.loads(note)
    return Record(note=note)


def send_replacement(task: Any, written: str) -> None:
    """Send again what the task was replaced by."""
    signature = task.app.signature(kombu_json.loads(written))
    with sent_by_celery():
        signature.delay()
