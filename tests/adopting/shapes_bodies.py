"""Projects whose tasks make a Session in their body."""

from support.adopting import Shape

HEAD = """
from .app import app
from .db import SessionLocal
from .models import Row
from .sent import check
from support.hand_written import Again, fate, slow

"""
RETRIES = "autoretry_for=(Again,), retry_kwargs={'countdown': 0, 'max_retries': 3}"
TASK = f"\n@app.task({RETRIES})\n"
DB = """
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker
from support.hand_written import URL

engine = create_engine(URL)
SessionLocal = sessionmaker(bind=engine)
"""
WRITE = 'db.add(Row(key=key, note=f"done {n}"))'
SENDS = ("prefork", "threads")
"""It sends before it commits."""

SHAPES = [
    Shape(
        "factory_try_finally",
        HEAD
        + TASK
        + f"""
def work(key, n):
    db = SessionLocal()
    try:
        {WRITE}
        db.flush()
        fate(key, n)
        check.delay(key, n)
        slow()
        db.commit()
    finally:
        db.close()
""",
        wrong=SENDS,
        written=(
            "def work(key, n, db: CurrentSession):",
            "alchemy.delay_on_commit(check, key, n)",
            "app.conf.alchemy_database_url = URL",
            '"expire_on_commit": True',
        ),
        gone=("db.close()", "SessionLocal"),
    ),
    Shape(
        "bound_with_retry",
        HEAD
        + f"""
@app.task(bind=True, max_retries=3)
def work(self, key, n):
    db = SessionLocal()
    try:
        {WRITE}
        db.flush()
        fate(key, n)
        db.commit()
        check.delay(key, n)
    except Again as error:
        db.rollback()
        raise self.retry(exc=error, countdown=0)
    except Exception:
        db.rollback()
        raise
    finally:
        db.close()
""",
        written=("raise self.retry(exc=error, countdown=0)", "db.rollback()", "check.delay(key, n)"),
        gone=("finally:",),
    ),
    Shape(
        "with_factory",
        HEAD
        + TASK
        + f"""
def work(key, n):
    with SessionLocal() as db:
        {WRITE}
        fate(key, n)
        db.flush()
        check.apply_async((key, n), countdown=0)
        slow()
        db.commit()
""",
        wrong=SENDS,
        written=("alchemy.apply_async_on_commit(check, (key, n), countdown=0)", "(key, n, db: CurrentSession)"),
        gone=("with SessionLocal() as db:",),
    ),
    Shape(
        "with_session_and_begin",
        """
from celery import shared_task
from sqlalchemy.orm import Session
from .db import engine
from .models import Row
from .sent import check
from support.hand_written import Again, fate, slow

"""
        + f"""
@shared_task({RETRIES})
def work(key, n):
    with Session(engine) as db, db.begin():
        {WRITE}
        db.flush()
        fate(key, n)
        check.delay(key, n)
        slow()
""",
        wrong=SENDS,
        written=("delay_on_commit",),
        gone=("db.begin()", "Session(engine)"),
    ),
    Shape(
        "factory_begin",
        HEAD
        + TASK
        + f"""
def work(key, n):
    with SessionLocal.begin() as db:
        {WRITE}
        fate(key, n)
    check.delay(key, n)
""",
        written=("with alchemy.unit_of_work() as db:",),
    ),
    Shape(
        "begin_inside",
        HEAD
        + TASK
        + f"""
def work(key, n):
    with SessionLocal() as db:
        with db.begin():
            {WRITE}
            fate(key, n)
""",
        gone=("db.begin()",),
    ),
    Shape(
        "next_get_db",
        HEAD.replace("SessionLocal", "get_db")
        + TASK
        + f"""
def work(key: str, n: int, loud: bool = False):
    db = next(get_db())
    try:
        {WRITE}
        fate(key, n)
        check.delay(key, n)
        slow()
        db.commit()
        return {{"ok": True}}
    finally:
        db.close()
""",
        files={
            "db.py": DB
            + """

def get_db():
    db = SessionLocal()
    try:
        yield db
    finally:
        db.close()
""",
            "web.py": "from .db import get_db\n\n\ndef view(db=get_db):\n    return db\n",
        },
        wrong=SENDS,
        written=("*, db: CurrentSession", "def get_db():", "session_factory=SessionLocal"),
        gone=("next(get_db())",),
    ),
    Shape(
        "generator_in_a_variable",
        HEAD.replace("SessionLocal", "get_db")
        + TASK
        + f"""
def work(key, n):
    generator = get_db()
    db = next(generator)
    try:
        {WRITE}
        fate(key, n)
        db.commit()
    finally:
        generator.close()
""",
        files={"db.py": DB + "\n\ndef get_db():\n    with SessionLocal() as db:\n        yield db\n"},
        gone=("generator", "get_db"),
    ),
    Shape(
        "early_return",
        HEAD
        + TASK
        + f"""
def work(key, n):
    db = SessionLocal()
    try:
        {WRITE}
        fate(key, n)
        if n % 5 == 2:
            return "nothing"
        db.commit()
    finally:
        db.close()
""",
        rows=("done {n}|not 2",),
        written=("commit_on_success=False",),
    ),
    Shape(
        "returns_the_error",
        HEAD
        + f"""
@app.task
def work(key, n):
    db = SessionLocal()
    try:
        {WRITE}
        db.flush()
        if n % 5 == 2:
            db.add(Row(id=db.query(Row.id).first()[0], key=key, note="twice"))
        if n % 5 == 4:
            raise KeyError(n)
        db.commit()
        if n % 5 == 3:
            raise ValueError(n)
    except ValueError:
        db.query(Row).filter_by(key=key, note=f"done {{n}}").delete()
        db.commit()
        raise
    except Exception as error:
        return {{"error": str(error)}}
    finally:
        db.close()
""",
        rows=("done {n}|not 2 4",),
        written=("commit_on_success=False", "db.rollback()"),
    ),
    Shape(
        "scope_that_commits",
        HEAD.replace("SessionLocal", "session_scope")
        + TASK
        + f"""
def work(key, n):
    with session_scope() as db:
        {WRITE}
        db.flush()
        fate(key, n)
        check.delay(key, n)
        slow()
        return n
""",
        files={
            "db.py": "from contextlib import contextmanager\n"
            + DB
            + """

@contextmanager
def session_scope():
    session = SessionLocal()
    try:
        yield session
        session.commit()
    except Exception:
        session.rollback()
        raise
    finally:
        session.close()
"""
        },
        wrong=SENDS,
        written=("delay_on_commit",),
        gone=("session_scope", "contextmanager"),
    ),
    Shape(
        "none_at_first",
        HEAD
        + TASK
        + f"""
def work(key, n):
    db = None
    try:
        db = SessionLocal()
        {WRITE}
        fate(key, n)
        db.commit()
    finally:
        if db is not None:
            db.close()
""",
        gone=("db = None", "finally:"),
    ),
    Shape(
        "never_closed",
        HEAD
        + TASK
        + f"""
def work(key, n):
    db = SessionLocal()
    {WRITE}
    db.flush()
    fate(key, n)
    db.commit()
""",
        wrong=("prefork?", "threads?"),
        gone=("SessionLocal()",),
    ),
    Shape(
        "imported_in_the_task",
        f"""
from .app import app


@app.task({RETRIES.replace("Again", "Exception").replace("3", "1")})
def work(key, n):
    from support.hand_written import fate

    from .db import SessionLocal
    from .models import Row

    with SessionLocal() as db:
        {WRITE}
        if n % 5 != 4:
            fate(key, n)
        db.commit()
""",
        written=("db: CurrentSession",),
    ),
]
