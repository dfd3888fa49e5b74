"""Projects with a task class that keeps a Session, and with Sessions that stand at the top of a module."""

from adopting.shapes_bodies import HEAD, RETRIES, WRITE
from support.adopting import Shape

RECIPE = """
from celery import Task
from .db import SessionLocal


class DatabaseTask(Task):
    _db = None

    @property
    def db(self):
        if self._db is None:
            self._db = SessionLocal()
        return self._db

    def after_return(self, *args, **kwargs):
        if self._db is not None:
            self._db.close()
            self._db = None
"""
BODY = f"""
    self.{WRITE}
    self.db.flush()
    fate(key, n)
    self.db.commit()
"""
SHORT = HEAD.replace("from .db import SessionLocal\n", "").replace("from .sent import check\n", "")
RECIPE_TASK = f"\n@app.task(base=DatabaseTask, bind=True, {RETRIES})\ndef work(self, key, n):"
BOTH = ("prefork", "threads")

SHAPES = [
    Shape(
        "recipe",
        SHORT + RECIPE.replace("from celery", "\nfrom celery") + "\n" + RECIPE_TASK + BODY,
        wrong=BOTH,
        written=("from celery_alchemy import DatabaseTask", "base=DatabaseTask, bind=True"),
        gone=("class DatabaseTask", "after_return", "import Task"),
    ),
    Shape(
        "recipe_elsewhere",
        SHORT
        + "from .base import SQLTask as Base\n"
        + RECIPE_TASK.replace("DatabaseTask", "Base")
        + BODY.replace("self.db", "self.session"),
        files={"base.py": RECIPE.replace("DatabaseTask", "SQLTask").replace("def db", "def session")},
        wrong=BOTH,
        written=("self.db.commit()", "base=DatabaseTask"),
        gone=("SQLTask", "self.session"),
    ),
    Shape(
        "recipe_that_does_more",
        SHORT + "from .base import DatabaseTask\n" + RECIPE_TASK + BODY,
        files={
            "base.py": RECIPE
            + """
    def on_failure(self, exc, task_id, args, kwargs, einfo):
        print("failed", task_id)
        if self._db:
            self._db.rollback()
        super().on_failure(exc, task_id, args, kwargs, einfo)
"""
        },
        wrong=BOTH,
        written=(
            "class DatabaseTask(celery_alchemy.DatabaseTask):",
            'print("failed", task_id)',
            "import celery_alchemy",
        ),
        gone=("SessionLocal", "_db"),
    ),
    Shape(
        "sessions_by_id",
        SHORT
        + """
from celery import Task
from .db import SessionLocal


class DBTask(Task):
    def __init__(self):
        self.sessions = {}

    def before_start(self, task_id, args, kwargs):
        self.sessions[task_id] = SessionLocal()
        super().before_start(task_id, args, kwargs)

    def after_return(self, status, retval, task_id, args, kwargs, einfo):
        session = self.sessions.pop(task_id)
        session.close()
        super().after_return(status, retval, task_id, args, kwargs, einfo)

    @property
    def session(self):
        return self.sessions[self.request.id]

"""
        + RECIPE_TASK.replace("DatabaseTask", "DBTask")
        + BODY.replace("self.db", "self.session"),
        wrong=("prefork?", "threads?"),
        written=("base=DatabaseTask", "self.db.commit()"),
        gone=("DBTask", "sessions"),
    ),
    Shape(
        "session_in_call",
        SHORT
        + """
from celery import Task
from .db import SessionLocal


class Base(Task):
    abstract = True

    def __call__(self, *args, **kwargs):
        self.db = SessionLocal()
        try:
            return super().__call__(*args, **kwargs)
        except Exception:
            self.db.rollback()
            raise
        finally:
            self.db.close()

"""
        + RECIPE_TASK.replace("DatabaseTask", "Base")
        + BODY,
        wrong=("threads",),
        written=("base=DatabaseTask",),
        gone=("class Base(Task)", "__call__"),
    ),
    Shape(
        "before_start_and_hooks",
        SHORT
        + """
from celery import Task
from .db import SessionLocal


class Base(Task):
    db = None

    def before_start(self, task_id, args, kwargs):
        self.db = SessionLocal()

    def on_success(self, retval, task_id, args, kwargs):
        if self.db:
            self.db.close()

    def on_failure(self, exc, task_id, args, kwargs, einfo):
        if self.db:
            self.db.rollback()
            self.db.close()

"""
        + RECIPE_TASK.replace("DatabaseTask", "Base")
        + BODY,
        wrong=("prefork?", "threads"),
        written=("base=DatabaseTask",),
        gone=("class Base(Task)", "on_success"),
    ),
    Shape(
        "task_cls",
        SHORT + f"\n@app.task(bind=True, {RETRIES})\ndef work(self, key, n):" + BODY.replace("self.db", "self.session"),
        files={
            "base.py": RECIPE.replace("def db", "def session"),
            "app.py": """
from celery import Celery
from support.hand_written import configure
from .base import DatabaseTask

app = Celery("shop", include=["shop.tasks"], task_cls=DatabaseTask)
configure(app)
""",
        },
        wrong=BOTH,
        written=('task_cls="celery_alchemy:DatabaseTask"', "self.db.commit()"),
        gone=("class DatabaseTask",),
    ),
    Shape(
        "class_on_the_recipe",
        SHORT
        + "from .base import DatabaseTask\n"
        + f"""

class Work(DatabaseTask):
    name = "shop.tasks.work"
    autoretry_for = (Again,)
    retry_kwargs = {{"countdown": 0, "max_retries": 3}}

    def run(self, key, n):
        self.{WRITE}
        self.db.flush()
        fate(key, n)
        self.db.commit()


app.register_task(Work())
""",
        files={"base.py": RECIPE},
        wrong=BOTH,
        written=("class Work(DatabaseTask):", "from celery_alchemy import DatabaseTask"),
        gone=("after_return",),
    ),
    Shape(
        "class_with_all_of_it",
        SHORT
        + RECIPE.replace("class DatabaseTask", "class Work")
        + f"""
    name = "shop.tasks.work"
    autoretry_for = (Again,)
    retry_kwargs = {{"countdown": 0, "max_retries": 3}}

    def run(self, key, n):
        self.{WRITE}
        self.db.flush()
        fate(key, n)
        self.db.commit()


app.register_task(Work())
""",
        wrong=BOTH,
        written=("class Work(DatabaseTask):",),
        gone=("after_return", "_db"),
    ),
    Shape(
        "recipe_with_a_method",
        SHORT
        + "from .base import DatabaseTask\n"
        + RECIPE_TASK
        + BODY.replace("\n    self.db.add", "\n    db = self.get_db()\n    self.db.add").replace("self.db.", "db."),
        files={"base.py": RECIPE.replace("    @property\n", "").replace("def db", "def get_db")},
        wrong=BOTH,
        written=("db = self.db",),
        gone=("get_db",),
    ),
    Shape(
        "recipe_that_commits",
        SHORT + "from .base import DatabaseTask\n" + RECIPE_TASK + BODY.replace("    self.db.commit()\n", ""),
        files={
            "base.py": RECIPE.replace(
                "        if self._db is not None:\n            self._db.close()",
                "        if self._db is not None:\n            self._db.commit()\n            self._db.close()",
            )
        },
        wrong=BOTH,
        written=("base=DatabaseTask",),
        gone=("after_return",),
    ),
    Shape(
        "recipe_and_a_class_of_options",
        SHORT
        + "from .base import DatabaseTask\n"
        + "\n\nclass Patient(DatabaseTask):\n    abstract = True\n    max_retries = 3\n\n"
        + RECIPE_TASK.replace("DatabaseTask", "Patient")
        + BODY,
        files={"base.py": RECIPE},
        wrong=BOTH,
        written=("class Patient(DatabaseTask):", "base=Patient"),
        gone=("after_return",),
    ),
    Shape(
        "plain_base_class",
        HEAD
        + """
from celery import Task


class Loud(Task):
    def on_failure(self, exc, task_id, args, kwargs, einfo):
        print("failed", task_id)

"""
        + f"\n@app.task(base=Loud, {RETRIES})\ndef work(key, n):\n    with SessionLocal() as db:\n        {WRITE}\n"
        "        fate(key, n)\n        db.commit()\n",
        written=("class Loud(DatabaseTask):", "base=Loud"),
        gone=("import Task",),
    ),
    Shape(
        "recipe_of_a_task_that_is_refused",
        SHORT
        + "from .base import DatabaseTask, Noting\n"
        + RECIPE_TASK.replace("DatabaseTask", "Noting")
        + BODY.replace("self.db.flush()", "self.note(key, n)")
        + """

@app.task(base=DatabaseTask, bind=True)
def late(self, key):
    self._db.close()
""",
        files={
            "base.py": RECIPE
            + """

class Noting(DatabaseTask):
    abstract = True

    def note(self, key, n):
        self.db.flush()
"""
        },
        wrong=BOTH,
        written=("class Noting(celery_alchemy.DatabaseTask):", "base=Noting", "class DatabaseTask(Task):"),
        refused=("late stays as it is: it uses self._db, where its base class keeps the Session",),
    ),
]
