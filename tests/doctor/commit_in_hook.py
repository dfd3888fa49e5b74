"""A COMMIT in a hook, which some endings skip."""

from celery import Celery, Task

app = Celery("shop", broker="redis://localhost")


class Committing(Task):
    abstract = True

    def after_return(self, status, retval, task_id, args, kwargs, einfo):
        self.session.commit()


@app.task(base=Committing)
def create(name): ...
