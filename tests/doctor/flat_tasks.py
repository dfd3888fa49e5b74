"""The recipe, its Session from a function of another module; a receiver for one sender."""

import flat_database
from celery import Celery, Task, signals

app = Celery("shop", broker="redis://localhost")


class WithSession(Task):
    abstract = True
    session = None

    def before_start(self, task_id, args, kwargs):
        self.session = flat_database.get_session()


@app.task(base=WithSession, bind=True)
def create(self, name):
    self.session.flush()


@signals.task_success.connect(sender=create)
def finish(sender, **_):
    sender.session.commit()
