"""The project that the workers under test run: `celery -A support.project.app worker`."""
