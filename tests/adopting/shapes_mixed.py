"""Projects of which some tasks are rewritten, and others stay as they are beside them."""

from adopting.shapes_bodies import HEAD, TASK, WRITE
from support.adopting import FILES, Shape

KINDS = FILES["db.py"] + "Quiet = sessionmaker(bind=engine, autoflush=False)\n"
"""Two kinds of Session on one Engine."""
TWO = HEAD.replace("import SessionLocal", "import Quiet, SessionLocal")
#: A task that is rewritten, or not, and does not run.
OTHER = """

@app.task
def {name}(key, n):
    with {maker}() as db:
        db.add(Row(key=key, note="never"))
        db.commit()
"""
#: Whether the query flushes shows in the note.
LOOKS = f"""
def work(key, n):
    with MAKER() as db:
        {WRITE}
        seen = db.query(Row).filter_by(key=key, note=f"done {{n}}").count()
        db.add(Row(key=key, note=f"saw {{seen}} {{n}}"))
        fate(key, n)
        db.commit()
"""
OTHERWISE = "its Session is on another database, or has other options, than that of most tasks"

SHAPES = [
    Shape(
        "two_kinds_of_options_most_are_quiet",
        TWO
        + TASK
        + LOOKS.replace("MAKER", "Quiet")
        + OTHER.format(name="one", maker="Quiet")
        + OTHER.format(name="two", maker="SessionLocal"),
        files={"db.py": KINDS},
        written=("def work(key, n, db: CurrentSession):", "with SessionLocal() as db:", '"autoflush": False'),
        refused=(f"two stays as it is: {OTHERWISE}",),
        rows=("done {n}", "saw 0 {n}"),
    ),
    Shape(
        "two_kinds_of_options_most_flush",
        TWO
        + TASK
        + LOOKS.replace("MAKER", "SessionLocal")
        + OTHER.format(name="one", maker="SessionLocal")
        + OTHER.format(name="two", maker="Quiet"),
        files={"db.py": KINDS},
        written=("def work(key, n, db: CurrentSession):", "with Quiet() as db:"),
        refused=(f"two stays as it is: {OTHERWISE}",),
        rows=("done {n}", "saw 1 {n}"),
    ),
    Shape(
        "two_kinds_of_options_its_own_is_rare",
        TWO
        + TASK
        + LOOKS.replace("MAKER", "Quiet")
        + OTHER.format(name="one", maker="SessionLocal")
        + OTHER.format(name="two", maker="SessionLocal"),
        files={"db.py": KINDS},
        written=("def one(key, n, db: CurrentSession):", "with Quiet() as db:"),
        refused=(f"work stays as it is: {OTHERWISE}",),
        rows=("done {n}", "saw 0 {n}"),
    ),
    Shape(
        "an_unknown_bind",
        HEAD
        + "from .db import engines\nfrom sqlalchemy.orm import Session\n"
        + TASK
        + f"""
def work(key, n):
    with Session(bind=engines["main"]) as db:
        {WRITE}
        fate(key, n)
        db.commit()
"""
        + OTHER.format(name="one", maker="SessionLocal"),
        files={"db.py": FILES["db.py"] + 'engines = {"main": engine}\n'},
        written=("def one(key, n, db: CurrentSession):", 'with Session(bind=engines["main"]) as db:'),
        refused=("work stays as it is: how its Session 'db' is made is not found, or decided at run time",),
    ),
    Shape(
        "a_helper_with_a_session_of_its_own",
        HEAD
        + "from .saving import audit, save\n"
        + TASK
        + f"""
def work(key, n):
    fate(key, n)
    save(key, n)


@app.task
def one(key, n):
    with SessionLocal() as db:
        {WRITE}
        audit(key, n)
        db.commit()
""",
        files={
            "saving.py": f"""
from .db import SessionLocal
from .models import Row


class Store:
    def __init__(self):
        self.db = SessionLocal()

    def add(self, key, n):
        try:
            self.{WRITE}
            self.db.commit()
        finally:
            self.db.close()


def save(key, n):
    store(key, n)


def store(key, n):
    Store().add(key, n)


def audit(key, n):
    with SessionLocal.begin() as db:
        db.add(Row(key=key, note="audited"))
"""
        },
        written=("def one(key, n, db: CurrentSession):", "def work(key, n):\n    fate(key, n)\n    save(key, n)"),
        refused=("work stays as it is: Store(), which it calls, opens a Session of its own (shop/saving.py:7)",),
    ),
    Shape(
        "changed_after_its_last_commit",
        HEAD
        + TASK
        + """
def work(key, n):
    db = None
    try:
        db = SessionLocal()
        row = Row(key=key, note=f"done {n}")
        db.add(row)
        fate(key, n)
        db.commit()
        row.note = "never"
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
    ),
]
