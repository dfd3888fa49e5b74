"""What the load generator tells a worker, by way of an environment variable."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from kombu.entity import Exchange, Queue

from ..tasks.patterns import OURS
from ..tasks.replies import kombu_url

DEFAULT_QUEUE = "celery-alchemy-loadtests"
RESULT_EXPIRES_S = 300
VARIABLE = "LOADTEST_WORKER"


@dataclass(frozen=True, slots=True)
class WorkerEnvironment:
    """Where one worker finds its database, its queue and the list it answers to."""

    database_url: str  # SQLAlchemy URL, password included: it travels in the environment, never in an argument list
    broker_url: str  # Kombu URL of the broker
    reply_url: str
    """redis-py URL of the server that holds the reply list; the broker itself where that is Redis or Valkey."""
    queue: str = DEFAULT_QUEUE
    """The one queue this worker consumes; every key it writes in the broker begins with this name."""
    pattern: str = OURS  # Name of the way in which tasks get their Session: one of `patterns.PATTERNS`
    used_in_main: bool = False  # The worker's main process uses the database before it forks, as code at import does

    @property
    def reply_key(self) -> str:
        """The list each finished task is pushed to."""
        return f"{self.queue}.replies"

    @property
    def ready_key(self) -> str:
        """The list the worker announces itself on, once it consumes."""
        return f"{self.queue}.ready"

    @property
    def broker_keys(self) -> tuple[str, ...]:
        """Every Redis key that serving this queue can leave behind."""
        keys = (self.queue, f"_kombu.binding.{self.queue}", self.reply_key, self.ready_key)
        return (*keys, *self._unacked_keys.values())

    @property
    def _unacked_keys(self) -> dict[str, str]:
        return {f"{name}_key": f"{self.queue}.{name}" for name in ("unacked", "unacked_index", "unacked_mutex")}

    def celery_settings(self) -> dict[str, Any]:
        """Return the settings that worker and load generator must share to meet on the queue."""
        # The default exchange routes by queue name, and leaves nothing of its own to delete on RabbitMQ.
        queue: Any = Queue(self.queue, Exchange(""), routing_key=self.queue)
        settings: dict[str, Any] = {
            "broker_url": self.broker_url,
            "broker_connection_retry_on_startup": False,
            "task_ignore_result": True,
            "task_default_queue": self.queue,
            "task_queues": [queue],
            "task_default_exchange": "",
            "task_default_routing_key": self.queue,
            "worker_enable_remote_control": False,
            "worker_prefetch_multiplier": 1,
        }
        if self.broker_url.startswith("redis"):
            # By default all queues of a Redis database share these three keys; ours are deleted after a run.
            settings["broker_transport_options"] = self._unacked_keys
        return settings

    def result_settings(self) -> dict[str, Any]:
        """Return the worker's settings for the few results it stores: those of the parts of a chord."""
        return {
            "result_backend": kombu_url(self.reply_url),
            "result_backend_transport_options": {"global_keyprefix": f"{self.queue}.result."},
            "result_expires": RESULT_EXPIRES_S,
            # Else each greenlet and each thread connects for itself.
            "result_backend_thread_safe": True,
        }

    def to_environ(self) -> dict[str, str]:
        """Return the variable that `from_environ` reads."""
        return {VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def from_environ(cls) -> WorkerEnvironment:
        """Read what the process that started this worker has told it."""
        return cls(**json.loads(os.environ[VARIABLE]))
