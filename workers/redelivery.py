"""When the broker delivers a message again whose worker was lost."""

from __future__ import annotations

from typing import Any

from celery import Celery

#: How long a message may be delivered again after its first delivery, where the broker is told nothing else; seconds.
_VISIBILITY_TIMEOUTS_S = {"redis": 3600.0, "rediss": 3600.0, "sentinel": 3600.0, "valkey": 3600.0, "sqs": 1800.0}


def redelivered_within_s(app: Celery) -> float | None:
    """Return within how many seconds the broker of `app` delivers a message again whose worker was lost; None: it does
    so at once, or is not known."""
    timeout: Any = (app.conf.broker_transport_options or {}).get("visibility_timeout")
    url = app.conf.broker_write_url or app.conf.broker_url
    scheme = str(url[0] if isinstance(url, list) and url else url or "").partition(":")[0].partition("+")[0]
    if scheme not in _VISIBILITY_TIMEOUTS_S:
        return None
    return float(timeout) if timeout else _VISIBILITY_TIMEOUTS_S[scheme]
