"""What a task returns, as its row keeps it: encoded as the app encodes results."""

from __future__ import annotations

import base64
import json
from typing import Any

from kombu import serialization
from kombu.exceptions import EncodeError

from ...strategies.features.completed import Record
from ...strategies.features.exactly_once import UNFINISHED

_BASE64 = ";base64"


def encode(app: Any, value: Any) -> Record:
    """Return the Record of a task that has returned `value`; that of None where it cannot be encoded: whether it had to
    be, others decide."""
    if value is None:
        return Record()
    try:
        content_type, encoding, data = serialization.dumps(value, app.conf.result_serializer)
    except EncodeError:
        return Record()
    if isinstance(data, bytes):
        if encoding == "binary":
            return Record(f"{content_type}{_BASE64}", base64.b64encode(data).decode("ascii"))
        data = data.decode(encoding)
    return Record(content_type, data)


def decode(app: Any, record: Record) -> Any:
    """Return what the task has returned.

    Raises:
        kombu.exceptions.DecodeError: it cannot be decoded.
        kombu.exceptions.ContentDisallowed: the app accepts no such results.
    """
    if record.content_type is None or record.result is None:
        return None
    content_type, binary, _ = record.content_type.partition(_BASE64)
    accept = serialization.prepare_accept_content(app.conf.result_accept_content or app.conf.accept_content)
    if binary:
        return serialization.loads(base64.b64decode(record.result), content_type, "binary", accept=accept)
    return serialization.loads(record.result, content_type, "utf-8", accept=accept)


def is_unfinished(record: Record) -> bool:
    """Tell whether the row was committed before its task had ended, and nothing has come after that."""
    return record.note == UNFINISHED


def note_of(record: Record) -> dict[str, Any]:
    """Return what the row says beside the result."""
    found = json.loads(record.note) if record.note else {}
    return found if isinstance(found, dict) else {}
