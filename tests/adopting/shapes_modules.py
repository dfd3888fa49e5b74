"""Projects with Sessions that stand at the top of a module, or are made when a process starts."""

from adopting.shapes_bodies import DB, HEAD, SENDS, TASK, WRITE
from support.adopting import Shape

BOTH = ("prefork", "threads")

SHAPES = [
    Shape(
        "module_level_session",
        HEAD.replace("SessionLocal", "session")
        + TASK
        + f"""
def work(key, n):
    session.{WRITE[3:]}
    fate(key, n)
    session.commit()
""",
        files={"db.py": DB + "session = SessionLocal()\n"},
        wrong=BOTH,
        written=("def work(key, n, session: CurrentSession):",),
        gone=("session = SessionLocal()",),
    ),
    Shape(
        "scoped_session_removed",
        HEAD.replace("SessionLocal", "Session")
        + TASK
        + f"""
def work(key, n):
    session = Session()
    try:
        session.{WRITE[3:]}
        session.flush()
        fate(key, n)
        check.delay(key, n)
        slow()
        session.commit()
    except Exception:
        session.rollback()
        raise
    finally:
        Session.remove()
""",
        files={
            "db.py": DB.replace("import sessionmaker", "import scoped_session, sessionmaker").replace(
                "SessionLocal = sessionmaker(bind=engine)", "Session = scoped_session(sessionmaker(bind=engine))"
            )
        },
        wrong=SENDS,
        written=("alchemy.share(Session)", "session_factory=Session.session_factory", "session = Session()"),
        gone=("Session.remove()",),
    ),
    Shape(
        "scoped_session_of_helpers",
        HEAD.replace("SessionLocal", "db_session")
        + "from .saving import save\n"
        + TASK
        + """
def work(key, n):
    save(key, n)
    db_session.flush()
    fate(key, n)
    db_session.commit()
""",
        files={
            "db.py": DB.replace("import sessionmaker", "import scoped_session, sessionmaker")
            + "db_session = scoped_session(SessionLocal)\n",
            "saving.py": "from .db import db_session\nfrom .models import Row\n\n\n"
            'def save(key, n):\n    db_session.add(Row(key=key, note=f"done {n}"))\n',
        },
        wrong=BOTH,
        written=("alchemy.share(db_session)",),
    ),
    Shape(
        "recipe_that_removes",
        HEAD.replace("SessionLocal", "db_session")
        + """
from celery import Task


class SqlAlchemyTask(Task):
    abstract = True

    def after_return(self, status, retval, task_id, args, kwargs, einfo):
        db_session.remove()

"""
        + TASK.replace("task(", "task(base=SqlAlchemyTask, ")
        + f"""
def work(key, n):
    db_session.{WRITE[3:]}
    db_session.flush()
    fate(key, n)
    db_session.commit()
""",
        files={
            "db.py": DB.replace("import sessionmaker", "import scoped_session, sessionmaker")
            + "db_session = scoped_session(SessionLocal)\n"
        },
        wrong=BOTH,
        written=("alchemy.share(db_session)",),
        gone=("SqlAlchemyTask",),
    ),
    Shape(
        "made_in_worker_process_init",
        HEAD.replace("import SessionLocal", "import get_session")
        + TASK
        + f"""
def work(key, n):
    db = get_session()
    try:
        {WRITE}
        fate(key, n)
        db.commit()
    finally:
        db.close()
""",
        files={
            "db.py": """
from celery.signals import worker_process_init, worker_process_shutdown
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker
from support.hand_written import URL

engine = None
SessionLocal = None


@worker_process_init.connect
def init(**kwargs):
    global engine, SessionLocal
    engine = create_engine(URL)
    SessionLocal = sessionmaker(bind=engine)


@worker_process_shutdown.connect
def shutdown(**kwargs):
    global engine
    if engine is not None:
        engine.dispose()


def get_session():
    return SessionLocal()
"""
        },
        wrong=("threads",),
        written=("app.conf.alchemy_database_url = URL",),
        gone=("worker_process_init", "SessionLocal", "get_session"),
    ),
]
