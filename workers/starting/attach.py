"""What an Alchemy adds to a Celery app: bootstep, command-line option, signals, and sending on commit."""

from __future__ import annotations

import importlib
import sys

import click
from billiard.exceptions import SoftTimeLimitExceeded
from celery import Celery

from ...strategies.interrupts import register_interrupt
from ..asyncio_pool.registering import register as register_asyncio_pool
from ..secrecy import mask_reports
from ..selection import OPTION
from ..sending.attach import attach as attach_sending
from . import signals

BOOTSTEP = "celery_alchemy.workers.starting.bootstep:SessionStrategyStep"
"""Celery imports it when a worker starts."""


def attach(app: Celery) -> None:
    """Add the bootstep, the command-line option and the sending on commit to `app`, once, and connect the signals, once
    per process."""
    attach_sending(app)
    mask_reports(app)
    if "celery.worker.control" in sys.modules:  # a worker, or `celery inspect`, which refuses what it does not know
        importlib.import_module("..watching.control", __package__)
    app.steps["worker"].add(BOOTSTEP)
    options = app.user_options["worker"]
    if not any(OPTION in getattr(option, "opts", ()) for option in options):
        options.add(
            click.Option(
                [OPTION],
                metavar="NAME",
                help="Session strategy of celery-alchemy: auto, local, scoped, per_process or package.module:Class. "
                "Overrides the setting alchemy_session_strategy.",
            )
        )
    register_asyncio_pool()
    register_interrupt(SoftTimeLimitExceeded)
    signals.connect()
