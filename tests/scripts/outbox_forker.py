"""Forks the processes of an outbox storm when told to: see `support/outbox_storm.py`.

Each line of its input is {"fork": role, "arguments": [...]} or {"poll": pid}; the answer is the pid, or the exit code.
"""

import gc
import importlib
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable

from scripts import outbox_shop

for module in (
    "celery.bin.celery", "celery.apps.worker", "celery.bin.worker", "celery.concurrency.solo",
    "celery.worker.components", "celery.worker.consumer", "celery.worker.strategy", "kombu.transport.redis",
    "kombu.transport.pyamqp", "psycopg", "pymysql", "sqlalchemy.dialects.postgresql.psycopg",
    "sqlalchemy.dialects.mysql.pymysql", "celery_alchemy.workers.commands.outbox",
):  # fmt: skip
    importlib.import_module(module)

ROLES: dict[str, Callable[..., None]] = {
    "web": outbox_shop.web,
    "worker": outbox_shop.worker,
    "sender": outbox_shop.sender,
}


def become(role: str, arguments: list[int]) -> None:
    warnings.simplefilter("ignore")  # of workers that run as root, at every start
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)  # the pipe of the answers is the parent's
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    code = 70
    try:
        ROLES[role](*arguments)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        asked = json.loads(line)
        if "poll" in asked:
            pid, status = os.waitpid(asked["poll"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        elif (pid := os.fork()) == 0:
            become(asked["fork"], asked["arguments"])
        else:
            print(json.dumps(pid), flush=True)


if __name__ == "__main__":
    main()
