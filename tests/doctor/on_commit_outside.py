"""Code that is no task, and waits for a COMMIT that nothing tells of."""

import json
import os

from celery import Celery, signals
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from celery_alchemy import Alchemy, DatabaseTask

app = Celery("shop", broker="redis://localhost")
app.conf.alchemy_database_url = os.environ["DOCTOR_URL"]
app.conf.update(task_acks_late=True, task_reject_on_worker_lost=True)
settings = json.loads(os.environ.get("DOCTOR_SETTINGS", "{}"))
shares = settings.pop("doctor_shares", False)
app.conf.update(settings)

db = Alchemy(app)
if shares:
    db.share(scoped_session(sessionmaker()))


@app.task(base=DatabaseTask)
def welcome(name): ...


def view(name):
    welcome.delay_on_commit(name)  # too early


async def async_view(name):
    welcome.apply_async_on_commit((name,))  # too early


class Views:
    def post(self, name):
        db.on_commit(lambda: welcome.delay(name))  # too early


@signals.worker_ready.connect
def ready(**_):
    send(app)


def send(what):
    welcome.delay_on_commit(what)  # too early


def view_that_knows(name, session: Session):
    welcome.apply_async_on_commit((name,), session=session)
    with db.unit_of_work():
        welcome.delay_on_commit(name)
    welcome.delay(name)


def called_by_a_task(name):
    called_by_a_helper(name)


def called_by_a_helper(name):
    welcome.delay_on_commit(name)


@app.task(base=DatabaseTask)
def create(name):
    called_by_a_task(name)
    welcome.delay_on_commit(name)


class Signup(DatabaseTask):
    name = "signup"

    def run(self, name):
        welcome.delay_on_commit(name)

    def on_success(self, retval, task_id, args, kwargs):
        welcome.delay_on_commit(retval)


app.register_task(Signup())


def make_tasks():
    @app.task(base=DatabaseTask)
    def inner(name):
        welcome.delay_on_commit(name)

    return inner
