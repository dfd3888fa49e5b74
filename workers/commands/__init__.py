"""`celery alchemy ...`."""

from .group import alchemy

__all__ = ["alchemy"]
