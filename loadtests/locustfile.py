"""Celery under load: `locust -f loadtests/locustfile.py --headless -u 50 -t 60s --worker-pool gevent`.

Starts services and a worker, or sends a task of your own: `--app proj.celery:app --task proj.tasks.import_order`.
"""

from celery_alchemy.loadtests.client import scenario
from celery_alchemy.loadtests.client.scenario import Load

scenario.register()

__all__ = ["Load"]
