"""What a task returns, as its row keeps it: encoded as the app encodes results."""

from __future__ import annotations

import base64
import json
from typing import Any

from celery.result import ResultBase
from kombu import serialization
from kombu.exceptions import EncodeError

from ...strategies.features.completed import Record
from ...strategies.features.exactly_once import UNFINISHED
from ..errors import ConfigurationError

_BASE64 = ";base64"
_HARMLESS = frozenset({"application/json", "application/x-msgpack", "application/x-yaml"})
"""To read these runs no code: rows are read that were written when the app had another serializer."""


def encode(app: Any, value: Any) -> Record:
    """Return the Record of a task that has returned `value`; that of None where it cannot be encoded: whether it had to
    be, others decide."""
    if value is None:
        return Record()
    serializer = app.conf.result_serializer
    try:
        content_type, _, data = serialization.dumps(value, serializer)
    except EncodeError:
        if not isinstance(value, ResultBase):
            return Record()
        content_type, _, data = serialization.dumps(value.as_tuple(), serializer)  # as every backend does
    if isinstance(data, str) and is_storable(data):
        return Record(content_type, data)
    encoded = data if isinstance(data, bytes) else data.encode("utf-8")
    return Record(f"{content_type}{_BASE64}", base64.b64encode(encoded).decode("ascii"))


def is_storable(text: str) -> bool:
    """Tell whether every database keeps `text` as it is: PostgreSQL keeps no NUL, and MariaDB by default not all of
    Unicode."""
    return text.isascii() and "\0" not in text


def decode(app: Any, record: Record) -> Any:
    """Return what the task has returned.

    Raises:
        kombu.exceptions.DecodeError: it cannot be decoded.
        kombu.exceptions.ContentDisallowed: the app accepts no such results.
    """
    if record.content_type is None or record.result is None:
        return None
    content_type, binary, _ = record.content_type.partition(_BASE64)
    data, accept = base64.b64decode(record.result) if binary else record.result, _accepted(app)
    if accept is not None:
        accept = {*accept, *_HARMLESS}
    return serialization.loads(data, content_type, "binary" if binary else "utf-8", accept=accept)


def refuse_unreadable(app: Any) -> None:
    """Refuse a serializer whose results this app does not read: a copy could not return what is recorded, and Celery
    reads what is stored before it stores a result again.

    Raises:
        ConfigurationError: it is one.
    """
    name, accept = app.conf.result_serializer, _accepted(app)
    if accept is not None and not serialization.prepare_accept_content([name]) <= accept:
        raise ConfigurationError(
            f"result_serializer={name!r}, and tasks have exactly_once: delivered again, such a task returns what it "
            f"has returned before, but this worker reads no such results. Add {name!r} to result_accept_content."
        )


def _accepted(app: Any) -> Any:
    """Return the content types of the results that `app` reads; None: all."""
    return serialization.prepare_accept_content(app.conf.result_accept_content or app.conf.accept_content)


def is_unfinished(record: Record) -> bool:
    """Tell whether the row was committed before its task had ended, and nothing has come after that."""
    return record.note == UNFINISHED


def note_of(record: Record) -> dict[str, Any]:
    """Return what the row says beside the result."""
    found = json.loads(record.note) if record.note else {}
    return found if isinstance(found, dict) else {}
