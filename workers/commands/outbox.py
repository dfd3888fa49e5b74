"""`celery alchemy outbox run`: the process that sends what waits in the outbox."""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any

import click
from celery import Celery
from kombu.exceptions import OperationalError
from sqlalchemy.exc import DBAPIError

from ...strategies.engines.transient import is_transient
from .. import apps
from ..sending.outbox import send_waiting

logger = logging.getLogger(__name__)

LONGEST_PAUSE_S = 30.0


def run_outbox(app: Celery, *, once: bool, interval_s: float) -> None:
    """Send what waits, again and again, until SIGTERM or SIGINT; or `once`.

    Raises:
        click.ClickException: the app has no Alchemy; with `once`, a row could not be sent.
    """
    app.loader.import_default_modules()
    db = apps.find(app)
    if db is None:
        raise click.ClickException(f"The app {app.main!r} has no Alchemy, so there is no outbox.")
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    pause_s = interval_s
    while not stopped.is_set():
        try:
            sent, failed = send_waiting(db)
        except (OperationalError, DBAPIError) as error:
            if once or not _passes(error):
                raise click.ClickException(f"{type(error).__name__}: {error}") from error
            logger.warning("The outbox waits for its database or its broker: %s", error)
            sent, failed, pause_s = 0, 0, min(pause_s * 2, LONGEST_PAUSE_S)
        else:
            pause_s = interval_s
        if sent:
            click.echo(f"sent {sent} rows of the outbox")
            continue
        if once:
            if failed:
                raise click.ClickException(f"{failed} rows of the outbox could not be sent; see the log.")
            return
        stopped.wait(pause_s)


def _passes(error: Any) -> bool:
    return isinstance(error, OperationalError) or is_transient(error)
