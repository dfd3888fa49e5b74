"""Projects whose tasks make several Sessions in their body, or do more with one."""

from adopting.shapes_bodies import DB, HEAD, RETRIES, SENDS, TASK, WRITE
from support.adopting import Shape

ONE_FILE = f"""
from celery import Celery
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker
from support.hand_written import URL, Again, configure, fate
from .models import Row

app = Celery("shop")
configure(app)
DATABASE = URL
engine = create_engine(DATABASE, pool_pre_ping=True)
Session = sessionmaker(engine)


@app.task(name="shop.tasks.work", {RETRIES})
def work(key, n):
    session = Session()
    try:
        session.{WRITE[3:]}
        fate(key, n)
        session.commit()
    finally:
        session.close()
"""
OWN_CLASS = """
from sqlalchemy import create_engine
from sqlalchemy.orm import Query, Session, sessionmaker
from support.hand_written import URL


class Own(Session):
    pass


engine = create_engine(URL)
SessionLocal = sessionmaker(engine, class_=Own, query_cls=Query)
"""
SHAPES = [
    Shape(
        "one_file",
        "from .app import work\n",
        files={"app.py": ONE_FILE},
        written=("app.conf.alchemy_database_url = DATABASE", '"pool_pre_ping": True', "session: CurrentSession"),
        gone=("Session = sessionmaker(engine)",),
    ),
    Shape(
        "session_class_of_their_own",
        HEAD
        + TASK
        + f"""
def work(key, n):
    with SessionLocal() as db:
        assert "Own" in [one.__name__ for one in type(db).__mro__]
        {WRITE}
        fate(key, n)
        db.commit()
""",
        files={"db.py": OWN_CLASS},
        written=("engine=engine, session_factory=SessionLocal", "SessionLocal = sessionmaker("),
    ),
    Shape(
        "two_around_slow_work",
        HEAD
        + TASK
        + f"""
def work(key, n):
    db = SessionLocal()
    try:
        count = db.query(Row).filter_by(key=key).count()
    finally:
        db.close()
    slow()
    db = SessionLocal()
    try:
        {WRITE}
        fate(key, n)
        db.commit()
    except Exception:
        db.rollback()
        raise
    finally:
        db.close()
    return count
""",
        written=("with alchemy.unit_of_work(commit=False) as db:",),
        gone=("finally:",),
    ),
    Shape(
        "two_blocks",
        HEAD
        + TASK
        + f"""
def work(key, n):
    with SessionLocal() as db:
        count = db.query(Row).filter_by(key=key).count()
    slow()
    with SessionLocal() as db:
        {WRITE}
        fate(key, n)
        db.commit()
    return count
""",
        written=("with alchemy.unit_of_work(commit=False) as db:",),
    ),
    Shape(
        "closed_before_slow_work",
        HEAD
        + TASK
        + f"""
def work(key, n):
    db = SessionLocal()
    {WRITE}
    db.commit()
    db.close()
    slow()
    db = SessionLocal()
    try:
        fate(key, n)
    except ValueError:
        db.query(Row).filter_by(key=key, note=f"done {{n}}").delete()
        db.commit()
        raise
    except Again:
        db.query(Row).filter_by(key=key, note=f"done {{n}}").delete()
        db.commit()
        raise
    finally:
        db.close()
""",
        written=("with alchemy.unit_of_work(commit=False) as db:",),
    ),
    Shape(
        "never_committed",
        HEAD
        + TASK
        + f"""
def work(key, n):
    db = SessionLocal()
    try:
        {WRITE}
        db.flush()
        fate(key, n)
    finally:
        db.close()
""",
        rows=(),
        written=("commit_on_success=False",),
    ),
    Shape(
        "given_to_helpers",
        HEAD
        + "from . import crud\nfrom .crud import Rows\n"
        + TASK
        + """
def work(key, n):
    db = SessionLocal()
    try:
        rows = Rows(db)
        rows.create(key, n)
        fate(key, n)
        crud.count(db, key=key)
        db.commit()
    finally:
        db.close()
""",
        files={
            "crud.py": """
from .models import Row


def count(session, key):
    return session.query(Row).filter_by(key=key).count()


class Rows:
    def __init__(self, db):
        self.db = db

    def create(self, key, n):
        self.db.add(Row(key=key, note=f"done {n}"))
        self.db.flush()
"""
        },
        written=("rows = Rows(db)",),
    ),
    Shape(
        "options_survive",
        HEAD
        + TASK
        + """
def work(key, n):
    with SessionLocal() as db:
        row = Row(key=key, note="first")
        db.add(row)
        fate(key, n)
        assert db.query(Row).filter_by(key=key, note="first", id=-1).count() == 0
        assert row in db.new, "autoflush is off"
        db.commit()
        row.note
        with SessionLocal() as other:
            other.query(Row).filter_by(id=row.id).update({"note": f"done {n}"})
            other.commit()
        db.commit()
        assert row.note == f"done {n}", "what has expired is read again"
""",
        files={
            "db.py": DB.replace("bind=engine", "bind=engine, autoflush=False").replace(
                "(URL)", '(URL, pool_size=10, isolation_level="READ COMMITTED")'
            )
        },
        written=('"autoflush": False', '"expire_on_commit": True', '"isolation_level": "READ COMMITTED"'),
    ),
    Shape(
        "made_by_a_function",
        HEAD.replace("SessionLocal", "get_session")
        + TASK
        + f"""
def work(key, n):
    session = get_session()
    try:
        session.{WRITE[3:]}
        fate(key, n)
        session.commit()
    except:
        session.rollback()
        raise
    finally:
        session.close()
""",
        files={"db.py": DB + '\n\ndef get_session():\n    """A Session."""\n    return SessionLocal()\n'},
        written=("session: CurrentSession",),
        gone=("get_session",),
    ),
    Shape(
        "class_with_run",
        HEAD
        + f"""
from celery import Task


class Work(Task):
    name = "shop.tasks.work"
    autoretry_for = (Again,)
    retry_kwargs = {{"countdown": 0, "max_retries": 3}}

    def run(self, key, n):
        db = SessionLocal()
        try:
            {WRITE}
            fate(key, n)
            db.commit()
        finally:
            db.close()


app.register_task(Work())
""",
        written=("class Work(DatabaseTask):", "def run(self, key, n, db: CurrentSession):"),
        gone=("import Task",),
    ),
    Shape(
        "called_like_a_function",
        HEAD
        + TASK
        + f"""
def work(key, n):
    with SessionLocal() as db:
        {WRITE}
        audit(key, n)
        fate(key, n)
        db.commit()


@app.task
def audit(key, n):
    db = SessionLocal()
    try:
        db.add(Row(key=key, note=f"tried {{n}}"))
        db.commit()
    finally:
        db.close()
""",
        rows=("done {n}", "tried {n}|tries"),
        written=("with alchemy.unit_of_work(commit=False) as db:", "db: CurrentSession"),
    ),
    Shape(
        "sends_its_own_tasks",
        HEAD
        + TASK
        + f"""
def work(key, n):
    db = SessionLocal()
    try:
        {WRITE}
        db.flush()
        fate(key, n)
        for _ in range(2):
            looked.apply_async(args=(key, n))
        slow()
        db.commit()
    finally:
        db.close()


@app.task(name="looked", queue=check.queue)
def looked(key, n):
    with SessionLocal() as db:
        return db.query(Row).count()
""",
        wrong=SENDS,
        written=("looked.apply_async_on_commit(args=(key, n))",),
    ),
    Shape(
        "savepoint",
        HEAD
        + "from sqlalchemy.exc import IntegrityError\n"
        + TASK
        + f"""
def work(key, n):
    with SessionLocal() as db:
        {WRITE}
        db.flush()
        try:
            with db.begin_nested():
                db.add(Row(id=db.query(Row.id).first()[0], key=key, note="twice"))
        except IntegrityError:
            pass
        fate(key, n)
        db.commit()
""",
        written=("with db.begin_nested():",),
    ),
    Shape(
        "sent_after_its_block",
        HEAD
        + TASK
        + f"""
def work(key, n):
    with SessionLocal.begin() as db:
        {WRITE}
        fate(key, n)
    check.delay(key, n)
""",
        written=("    check.delay(key, n)", "with alchemy.unit_of_work() as db:"),
    ),
    Shape(
        "changed_after_the_commit",
        HEAD
        + TASK
        + """
def work(key, n):
    db = None
    try:
        db = SessionLocal()
        row = db.get(Row, n)
        db.commit()
        row.notes.append(key)
    except Exception:
        if db is not None:
            db.rollback()
        raise
    finally:
        if db is not None:
            db.close()
""",
        written=("commit_on_success=False", "if db is not None:"),
        gone=("db = None", "db.close()"),
        runs=False,
    ),
    Shape(
        "sqlmodel",
        """
from sqlmodel import Session, select
from .app import app
from .db import engine
from .models import Row
from support.hand_written import Again, fate
"""
        + TASK
        + f"""
def work(key, n):
    with Session(engine) as session:
        session.{WRITE[3:]}
        session.exec(select(Row)).first()
        fate(key, n)
        session.commit()
""",
        written=("session_factory=Session", "session: CurrentSession"),
    ),
]
