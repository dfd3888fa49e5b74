"""Tasks that stay as they are."""

from adopting.shapes_bodies import DB, HEAD, WRITE
from support.adopting import Shape

WHOLE = f"""
    db = SessionLocal()
    try:
        {WRITE}
        fate(key, n)
        db.commit()
    finally:
        db.close()
"""

T = "\n\n\n@app.task\ndef work(key, n):\n"


def refused(name: str, body: str, reason: str, files: dict[str, str] | None = None, head: str = HEAD) -> Shape:
    """A project of one task that is refused."""
    return Shape(name, head + body, files=files or {}, refused=(reason,), unchanged=True, runs=False)


SHAPES = [
    refused(
        "stored",
        "\nkept = []\n" + T + "    db = SessionLocal()\n    kept.append(db)\n    db.commit()\n",
        "tasks.py:15: work stays as it is: its Session is given to kept.append()",
    ),
    refused(
        "kept_by_an_object_that_goes_on",
        "from . import crud\n" + T + "    db = SessionLocal()\n    crud.keep(db)\n    db.commit()\n",
        "stored",
        {"crud.py": "class Keeper:\n    db = None\n\n\ndef keep(db):\n    Keeper.db = db\n"},
    ),
    refused(
        "helper_closes",
        "from . import crud\n" + T + "    db = SessionLocal()\n    crud.end(db)\n    slow()\n",
        "end() closes its Session",
        {"crud.py": "def end(db):\n    db.commit()\n    db.close()\n"},
    ),
    refused(
        "helper_commits_and_goes_on",
        "from . import crud\n" + T + "    db = SessionLocal()\n    crud.go(db)\n    db.close()\n",
        "go(), which is given its Session, commits and goes on",
        {"crud.py": "def go(db):\n    db.commit()\n    db.add(object())\n"},
    ),
    refused(
        "threads",
        "from concurrent.futures import ThreadPoolExecutor\n" + T + "    db = SessionLocal()\n"
        "    with ThreadPoolExecutor() as pool:\n        pool.submit(slow)\n    db.commit()\n    db.close()\n",
        "ThreadPoolExecutor",
    ),
    refused(
        "inner_function",
        T + "    db = SessionLocal()\n\n    def save():\n        db.commit()\n\n    slow(save)\n",
        "function inside it",
    ),
    refused(
        "coroutine",
        "\n\n@app.task\nasync def work(key, n):\n    db = SessionLocal()\n    db.commit()\n    db.close()\n",
        "async def",
    ),
    refused(
        "factory_at_run_time",
        T + "    db = factories()[n]()\n    db.commit()\n    db.close()\n",
        "decided at run time: factories()[n]()",
    ),
    refused(
        "factory_with_arguments",
        T + "    db = SessionLocal(bind=key)\n    db.commit()\n    db.close()\n",
        "decided at run time",
    ),
    refused(
        "two_databases",
        "from .db import Other\n" + T + "    with SessionLocal() as db, Other() as other:\n"
        "        db.commit()\n        other.commit()\n",
        "two databases",
        {"db.py": DB + "reports = create_engine(URL)\nOther = sessionmaker(reports)\n"},
    ),
    refused(
        "database_error_caught",
        "from sqlalchemy.exc import IntegrityError\n" + T + "    with SessionLocal() as db:\n"
        "        try:\n            db.flush()\n        except IntegrityError:\n            pass\n        db.commit()\n",
        "`except IntegrityError:` catches a database error",
    ),
    refused(
        "error_caught_in_a_loop",
        T + "    with SessionLocal() as db:\n        for i in range(n):\n            try:\n"
        "                db.flush()\n            except Exception:\n                slow()\n        db.commit()\n",
        "`except Exception:` catches a database error",
    ),
    refused(
        "patched_by_tests",
        f"\n\n@app.task\ndef work(key, n):{WHOLE}",
        "a test replaces shop.tasks.SessionLocal",
        {"test_tasks.py": 'from unittest import mock\n\nmock.patch("shop.tasks.SessionLocal").start()\n'},
    ),
    refused(
        "decorated_twice",
        f"from functools import cache\n\n\n@app.task\n@cache\ndef work(key, n):{WHOLE}",
        "another decorator: @cache",
    ),
    refused(
        "base_from_elsewhere",
        f"from celery_singleton import Singleton\n\n\n@app.task(base=Singleton)\ndef work(key, n):{WHOLE}",
        "its base class Singleton is from elsewhere",
    ),
    refused(
        "begins_twice",
        T + "    db = SessionLocal()\n    with db.begin():\n        slow()\n"
        "    with db.begin():\n        slow()\n    db.close()\n",
        "begins transactions by hand",
    ),
    refused(
        "used_after_it_was_closed",
        T + "    db = SessionLocal()\n    db.commit()\n    db.close()\n    slow()\n    db.add(key)\n    db.commit()\n",
        "closed",
    ),
    refused(
        "in_a_loop",
        T + "    for _ in range(n):\n        db = SessionLocal()\n        db.commit()\n",
        "is not clear",
    ),
]

FLASK = """
from flask_sqlalchemy import SQLAlchemy

db = SQLAlchemy()
"""
ASYNC = """
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

AsyncSessionLocal = async_sessionmaker(create_async_engine("postgresql+psycopg://"))
"""
SHAPES += [
    refused(
        "flask_sqlalchemy",
        T + "    db.session.add(key)\n    db.session.commit()\n",
        "Flask-SQLAlchemy",
        {"db.py": FLASK},
        HEAD.replace("SessionLocal", "db"),
    ),
    refused(
        "async_session",
        "import asyncio" + T + "    async def run():\n        async with AsyncSessionLocal() as db:\n"
        "            await db.commit()\n\n    asyncio.run(run())\n",
        "AsyncSession",
        {"db.py": ASYNC},
        HEAD.replace("SessionLocal", "AsyncSessionLocal"),
    ),
    refused(
        "session_of_a_module_and_of_its_helpers",
        "from . import crud" + T + "    session.add(key)\n    crud.save(key)\n    session.commit()\n",
        "crud.py:5 uses it too",
        {
            "db.py": DB + "session = SessionLocal()\n",
            "crud.py": "from .db import session\n\n\ndef save(key):\n    session.add(key)\n",
        },
        HEAD.replace("SessionLocal", "session"),
    ),
    refused(
        "helper_that_swallows",
        "from . import crud" + T + "    with SessionLocal() as db:\n        crud.save(db, key)\n        db.commit()\n",
        "save(), which is given its Session, catches a database error",
        {
            "crud.py": "def save(db, key):\n    try:\n        db.add(key)\n        db.flush()\n"
            "    except Exception:\n        return None\n    return key\n"
        },
    ),
    refused(
        "an_alchemy_for_another_engine",
        T + WHOLE.lstrip("\n"),
        "has an Alchemy already",
        {"wired.py": "from celery_alchemy import Alchemy\nfrom .app import app\n\ndb = Alchemy(app)\n"},
    ),
    refused(
        "an_alchemy_with_other_options",
        T + WHOLE.lstrip("\n"),
        "with other options of its Session",
        {
            "wired.py": "from celery_alchemy import Alchemy\nfrom .app import app\nfrom .db import engine\n"
            "\ndb = Alchemy(app, engine=engine)\n"
        },
    ),
    refused(
        "session_on_something_else",
        T + "    with Session(engine.execution_options(isolation_level='AUTOCOMMIT')) as db:\n        db.add(key)\n",
        "how its Session is made is not found",
        head="from sqlalchemy.orm import Session\n" + HEAD.replace("SessionLocal", "engine"),
    ),
    refused(
        "session_without_a_name",
        T + "    slow(SessionLocal())\n",
        "where it cannot be followed",
    ),
    refused(
        "loop_over_a_generator",
        T + "    for db in get_db():\n        db.commit()\n",
        "comes from a loop over get_db()",
        {"db.py": DB + "\n\ndef get_db():\n    with SessionLocal() as db:\n        yield db\n"},
        HEAD.replace("SessionLocal", "get_db"),
    ),
    refused(
        "errors_suppressed",
        "from contextlib import suppress" + T + "    with SessionLocal() as db:\n        with suppress(Exception):\n"
        "            db.flush()\n        db.commit()\n",
        "suppress",
    ),
    refused(
        "name_of_a_parameter",
        "\n\n@app.task\ndef work(key, n, db=None):\n    db = SessionLocal()\n    db.commit()\n    db.close()\n",
        "also a parameter",
    ),
    refused(
        "kept_on_the_task",
        "from celery import Task\n\n\nclass Work(Task):\n    def run(self, key, n):\n        self.db = SessionLocal()\n"
        "        self.db.commit()\n",
        "where it cannot be followed",
    ),
    refused(
        "app_imports_the_tasks_first",
        T.replace("app.task", "shared_task") + "    with SessionLocal() as db:\n        db.commit()\n    slow()\n",
        "imports shop/tasks.py before it makes its app",
        {"app.py": "from celery import Celery\nfrom . import tasks\n\napp = Celery()\n"},
        HEAD.replace("from .app import app", "from celery import shared_task").replace("\nfrom .sent import check", ""),
    ),
    refused(
        "engine_imports_the_app",
        T + WHOLE.lstrip("\n"),
        "would import shop/db.py, which imports shop/app.py",
        {"db.py": "from .app import app\n" + DB, "web.py": "from .db import SessionLocal\n\nSessionLocal()\n"},
    ),
    refused(
        "task_class_of_the_app",
        T + WHOLE.lstrip("\n"),
        "its task class is given by app.Task in shop/app.py:11",
        {
            "app.py": "from celery import Celery\n\napp = Celery()\n\n\nclass ContextTask(app.Task):\n"
            "    def __call__(self, *args):\n        return self.run(*args)\n\n\napp.Task = ContextTask\n"
        },
    ),
    refused(
        "two_apps",
        T + WHOLE.lstrip("\n"),
        "one Celery app",
        {"other.py": "from celery import Celery\n\nother = Celery()\n"},
    ),
]
