"""The Celery side: extension, task class, worker-pool detection, lifecycle. The only folder that imports Celery."""

from .errors import ConfigurationError
from .extension import Alchemy
from .injection import CurrentSession, UseDatabase
from .task import DatabaseTask

__all__ = ["Alchemy", "ConfigurationError", "CurrentSession", "DatabaseTask", "UseDatabase"]
