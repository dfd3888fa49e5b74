"""Makes `--pool=asyncio` known to Celery, where Celery brings no worker pool of that name."""

from __future__ import annotations

import sys

from celery import concurrency

NAME = "asyncio"
POOL = "celery_alchemy.workers.asyncio_pool.pool:TaskPool"
"""Celery imports it when a worker starts with it; `CELERY_CUSTOM_WORKER_POOL` may name it too."""


def register() -> None:
    """Let `worker_pool = "asyncio"` and `--pool=asyncio` mean our pool; called when an app gets its Alchemy."""
    if concurrency.ALIASES.setdefault(NAME, POOL) != POOL:
        return  # Celery has one: it is its name
    command = sys.modules.get("celery.bin.worker")
    if command is not None:  # the command line is being read, and knows the names of its own start
        choice = command.WORKERS_POOL
        if NAME not in choice.choices:
            choice.choices = (*choice.choices, NAME)
