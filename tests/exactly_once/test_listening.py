"""Tasks that run for the first time while another one is in its COMMIT: the listeners of Sessions are there by then."""

import threading
from typing import Any

from sqlalchemy import event, text
from sqlalchemy.orm import Session
from support.databases import PostgreSQL
from support.exactly_once import TABLE, Once, new_id
from support.project.models import Row
from support.waiting import eventually

from celery_alchemy import DatabaseTask
from celery_alchemy.strategies.features import outbox_writing


def test_a_first_message_while_another_task_commits(run_database: PostgreSQL, key: str) -> None:
    """With "last", the INSERT of the row waits in the event before the COMMIT; the first message of the process used to
    add a listener to that event meanwhile, and the COMMIT failed."""
    listeners = {"before_commit": outbox_writing._before_commit, "after_commit": outbox_writing._after_commit}
    for name, function in listeners.items():
        if event.contains(Session, name, function):
            event.remove(Session, name, function)  # as in a process that has sent no message
    once = Once(run_database, alchemy_outbox="relay", alchemy_engine_options={"pool_size": 4})

    @once.app.task(base=DatabaseTask, bind=True, exactly_once="last")
    def slow(self: Any) -> str:
        self.db.add(Row(key=key, note="slow"))
        return "slow"

    @once.app.task(base=DatabaseTask, bind=True)
    def sends(self: Any) -> str:
        self.db.add(Row(key=key, note="sends"))
        slow.delay_on_commit()
        return "sends"

    once.app.finalize()
    task_id, ended = new_id(), []
    thread = threading.Thread(target=lambda: ended.append(once.deliver(once.app.tasks[slow.name], task_id=task_id)))
    try:
        with once.db.engine.connect() as connection:
            insert = f"INSERT INTO {TABLE} (task_id, nesting, task, completed_at) VALUES (:i, 0, '', 0)"
            connection.execute(text(insert), {"i": task_id})
            thread.start()
            waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND application_name = 'once'"
            eventually(lambda: run_database.column(waits)[0], "the INSERT waits")
            assert once.deliver(sends, task_id=new_id()) == ("SUCCESS", "sends")
            connection.rollback()
        thread.join(30)
        assert ended == [("SUCCESS", "slow")]
        assert sorted(run_database.rows(key)) == ["sends", "slow"]
    finally:
        once.close()
