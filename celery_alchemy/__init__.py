"""SQLAlchemy sessions for Celery tasks, right under every worker pool."""
