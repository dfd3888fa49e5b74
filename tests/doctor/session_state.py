"""Tasks that leave something on the server's side of their connection; those that do say so at the line's end."""

import json
import os

from celery import Celery
from sqlalchemy import event, func, select, text

from celery_alchemy import Alchemy, DatabaseTask

app = Celery("shop", broker="redis://localhost")
app.conf.alchemy_database_url = os.environ["DOCTOR_URL"]
app.conf.update(task_acks_late=True, task_reject_on_worker_lost=True)
app.conf.update(json.loads(os.environ["DOCTOR_SETTINGS"]))
db = Alchemy(app)

TENANT = text("SET app.tenant = 'a'")
UPDATE = "UPDATE users SET role = 'x'"


@db.on_engine
def listen(engine):
    @event.listens_for(engine, "connect")
    def set_zone(connection, record):
        connection.cursor().execute("SET TIME ZONE 'UTC'")


def become(role):
    db.session.execute(text(f"SET ROLE {role}"))  # stays


@app.task(base=DatabaseTask, bind=True)
def tenants(self, tenant):
    become("reader")
    self.db.execute(TENANT)  # stays
    self.db.execute(text("SELECT set_config('app.tenant', :tenant, false)"), {"tenant": tenant})  # stays
    self.db.execute(select(func.set_config("app.tenant", tenant, False)))  # stays
    self.db.execute(text(f"set search_path to {tenant}, public"))  # stays
    self.db.execute(text("SELECT 1; SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"))  # stays
    self.db.connection().exec_driver_sql("SET @tenant = 5")  # stays
    self.db.execute(text("USE other"))  # stays


@app.task(base=DatabaseTask, bind=True)
def others(self):
    self.db.execute(text("CREATE TEMP TABLE work (a int)"))  # stays
    self.db.execute(text("SELECT pg_try_advisory_lock(1)"))  # stays
    self.db.scalar(select(func.pg_advisory_lock_shared(1)))  # stays
    self.db.scalar(text("SELECT GET_LOCK('a', 1)"))  # stays
    self.db.execute(text("LISTEN somebody"))  # stays
    self.db.execute(text("PREPARE mine AS SELECT 1"))  # stays
    self.db.execute(text("DECLARE c CURSOR WITH HOLD FOR SELECT 1"))  # stays
    self.db.execute(text("LOCK TABLES users READ"))  # stays


@app.task(base=DatabaseTask, bind=True)
def right(self, tenant):
    self.db.execute(text("SET LOCAL app.tenant = 'a'"))
    self.db.execute(text("SET TRANSACTION READ ONLY"))
    self.db.execute(text("SET CONSTRAINTS ALL DEFERRED"))
    self.db.execute(text("SELECT set_config('app.tenant', :tenant, true)"), {"tenant": tenant})
    self.db.execute(select(func.set_config("app.tenant", tenant, True)))
    self.db.execute(text("CREATE TEMP TABLE work (a int) ON COMMIT DROP"))
    self.db.execute(text("SELECT pg_advisory_xact_lock(1)"))
    self.db.scalar(text("SELECT 'SET ROLE x'"))
    self.db.execute(text(UPDATE))


@app.task(base=DatabaseTask, bind=True)
def unlocks(self):
    self.db.execute(text("SELECT pg_advisory_lock(1)"))
    self.db.execute(text("SELECT pg_advisory_unlock(1)"))
