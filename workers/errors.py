"""The one error of ours that is Celery's too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from celery.exceptions import ImproperlyConfigured

from ..strategies.errors import InvalidSetting


class ConfigurationError(InvalidSetting, ImproperlyConfigured):  # type: ignore[misc]
    """A setting is missing, unknown or of no use; the message names the value, the place and the remedy."""


@contextmanager
def as_configuration_error() -> Iterator[None]:
    """Give what `strategies` refuses, which knows no Celery, the type that Celery's users catch."""
    try:
        yield
    except ConfigurationError:
        raise
    except InvalidSetting as error:
        raise ConfigurationError(str(error)) from error.__cause__
