"""What `celery -A shop.worker worker` loads: the Celery app, configured by the factory."""

from . import create_app
from .extensions import app

create_app()

__all__ = ["app"]
