"""Start a worker from a program, which Celery does not monkey patch; the argument is its worker pool."""

import sys

from support.project.app import app, config

worker = app.Worker(pool=sys.argv[1], concurrency=2, queues=[config["queue"]], loglevel="INFO")
worker.start()
sys.exit(worker.exitcode)
