"""`celery alchemy outbox run`: the process that sends what waits in the outbox."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

import click
from celery import Celery
from kombu.exceptions import OperationalError
from sqlalchemy.exc import DBAPIError

from ...strategies.engines.transient import is_transient
from ...strategies.features.outbox_wakeup import Wakeup
from ...strategies.names import counted
from .. import apps
from ..apps import Served
from ..sending.outbox import send_waiting
from ..watching import observers
from ..watching.outbox import tell

logger: logging.Logger = logging.getLogger(__name__)

LONGEST_PAUSE_S = 30.0
TELL_EVERY_S = 10.0
"""What is in the outbox is counted for metrics this often."""


class Stop:
    """What a signal has asked for: the first one ends the process after the message that it is sending, a second one at
    once.

    Also where the process was started with SIGINT ignored, as a shell does with what it puts into the background.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self.asked: Callable[[], bool] = self._event.is_set
        self.wait: Callable[[float | None], bool] = self._event.wait
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        if self._event.is_set():
            raise SystemExit(128 + number)
        self._event.set()


def run_outbox(app: Celery, *, once: bool, interval_s: float) -> None:
    """Send what waits, again and again, until SIGTERM or SIGINT; or `once`.

    Raises:
        click.ClickException: the app has no Alchemy; with `once`, a message could not be sent.
    """
    stop = Stop()
    app.loader.import_default_modules()
    db = apps.find(app)
    if db is None:
        raise click.ClickException(f"There is no outbox: {apps.explain_none(app)}")
    if db.settings.metrics is not None and observers.current() is None:
        observers.start(db.settings.metrics)
    if once:
        _send_once(db, stop)
    else:
        _send_on(db, stop, interval_s)


def _send_once(db: Served, stop: Stop) -> None:
    failures = 0
    while not stop.asked():
        try:
            sent, failed = send_waiting(db, stopping=stop.asked)
        except (OperationalError, DBAPIError) as error:
            raise click.ClickException(f"{type(error).__name__}: {error}") from error
        failures += failed
        _say(sent)
        if not sent and not failed:
            break
    if failures:
        raise click.ClickException(f"{counted(failures, 'message')} of the outbox could not be sent; see the log.")


def _send_on(db: Served, stop: Stop, interval_s: float) -> None:
    listens = db.settings.external_pooler is None and not db.strategy.awaits
    wakeup = Wakeup(lambda: db.engine, stop.wait, listens=listens)
    wakeup.listen()  # before the first look: what comes after that is told
    pause_s, told_at = interval_s, -TELL_EVERY_S
    while not stop.asked():
        if monotonic() - told_at >= TELL_EVERY_S:
            told_at = monotonic()
            tell(db)
        try:
            sent, failed = send_waiting(db, stopping=stop.asked)
        except (OperationalError, DBAPIError) as error:
            if not _passes(error):
                raise click.ClickException(f"{type(error).__name__}: {error}") from error
            logger.warning("The outbox waits for its database or its broker: %s", error)
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
            stop.wait(pause_s)
            continue
        pause_s = interval_s
        _say(sent)
        if not sent and not failed:
            wakeup.wait(interval_s, stop.asked)
    wakeup.close()


def _say(sent: int) -> None:
    if sent:
        click.echo(f"sent {counted(sent, 'message')} of the outbox")


def _passes(error: Any) -> bool:
    return isinstance(error, OperationalError) or is_transient(error)
