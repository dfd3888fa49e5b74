"""The errors of ours that are Celery's too."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from celery.exceptions import ImproperlyConfigured, Reject
from click import ClickException
from kombu.exceptions import EncodeError, OperationalError

from ..strategies.errors import CeleryAlchemyError, InvalidSetting


class ConfigurationError(InvalidSetting, ImproperlyConfigured, ClickException):  # type: ignore[misc]
    """A setting is missing, unknown or of no use; the message names the value, the place and the remedy.

    Where it reaches the command line, `celery` prints the message without a traceback and ends with exit code 1. A
    program that starts a worker itself catches it as any other exception.
    """

    logged = False
    """It is on the terminal already, as a line of the log, and the command line need not repeat it."""

    def __init__(self, message: str = "") -> None:
        ClickException.__init__(self, message)

    def __str__(self) -> str:
        return self.message

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the message, for click."""
        if not self.logged:
            super().show(file or sys.__stderr__)  # where the worker has a log file, `sys.stderr` ends there


class UnencodableResult(CeleryAlchemyError, EncodeError):  # type: ignore[misc]
    """A task returned what Celery cannot store, nor send to the next task; nothing of it is committed."""


class UnencodableArgument(CeleryAlchemyError, EncodeError):  # type: ignore[misc]
    """An argument of a task cannot be sent; the message names it, and what to pass instead."""


class GivenBack(Reject):  # type: ignore[misc]
    """A copy of a task with `exactly_once` gives its message back to the broker: another one has not ended."""


class BrokerGone(CeleryAlchemyError, OperationalError):  # type: ignore[misc]
    """The broker cannot be reached, or does not answer. No message is to blame."""


class Unsendable(CeleryAlchemyError):
    """A message can never be sent as it is; others can."""


@contextmanager
def as_configuration_error() -> Iterator[None]:
    """Give what `strategies` refuses, which knows no Celery, the type that Celery's users catch."""
    try:
        yield
    except ConfigurationError:
        raise
    except InvalidSetting as error:
        raise ConfigurationError(str(error)) from error.__cause__
