"""Projects that need nothing."""

from adopting.shapes_bodies import DB, RETRIES, TASK, WRITE
from support.adopting import Shape

ADOPTED = """
from celery_alchemy import Alchemy
from support.hand_written import URL
from .app import app

app.conf.alchemy_database_url = URL
alchemy = Alchemy(app)
"""
OURS = """
from celery_alchemy import CurrentSession, DatabaseTask
from .app import app
from .db import alchemy
from .models import Row
from .sent import check
from support.hand_written import Again, fate, slow

"""


def right(name: str, tasks: str, *, refused: tuple[str, ...] = (), **files: str) -> Shape:
    """A project that needs nothing."""
    files = {f"{file}.py": text for file, text in files.items()}
    return Shape(name, tasks, files=files, refused=refused, unchanged=True)


SHAPES = [
    right(
        "adopted_self_db",
        OURS
        + f"""
@app.task(base=DatabaseTask, bind=True, {RETRIES})
def work(self, key, n):
    self.{WRITE}
    fate(key, n)
    check.apply_async
    alchemy.delay_on_commit(check, key, n)
    slow()
""",
        db=ADOPTED,
    ),
    right(
        "adopted_current_session",
        OURS
        + f"""
@app.task(base=DatabaseTask, {RETRIES})
def work(key, n, db: CurrentSession):
    {WRITE}
    fate(key, n)
    db.commit()
    check.delay(key, n)
""",
        db=ADOPTED,
    ),
    right(
        "adopted_block",
        OURS
        + TASK
        + f"""
def work(key, n):
    with alchemy.unit_of_work() as db:
        {WRITE}
        fate(key, n)
""",
        db=ADOPTED,
    ),
    right(
        "adopted_class",
        OURS
        + f"""
class Base(DatabaseTask):
    abstract = True
    autoretry_for = (Again,)
    retry_kwargs = {{"countdown": 0, "max_retries": 3}}


@app.task(base=Base)
def work(key, n):
    db = alchemy.session
    {WRITE}
    fate(key, n)
""",
        db=ADOPTED,
    ),
    right(
        "helper_opens_its_own",
        f"""
from .app import app
from .saving import save
from support.hand_written import Again, fate
{TASK}
def work(key, n):
    fate(key, n)
    save(key, n)
""",
        refused=("work stays as it is: save(), which it calls, opens a Session of its own (shop/saving.py:6): let it",),
        saving=f"""
from .db import SessionLocal
from .models import Row


def save(key, n):
    with SessionLocal() as db, db.begin():
        {WRITE}
""",
    ),
    right(
        "core_connections",
        f"""
from sqlalchemy import insert
from .app import app
from .db import engine
from .models import Row
from support.hand_written import Again, fate
{TASK}
def work(key, n):
    with engine.begin() as connection:
        connection.execute(insert(Row).values(key=key, note=f"done {{n}}"))
        fate(key, n)
""",
        db=DB.replace("create_engine(URL)", "create_engine(URL, pool_pre_ping=True)"),
    ),
    right(
        "driver_by_hand",
        f"""
import psycopg
from sqlalchemy import make_url
from .app import app
from support.hand_written import URL, Again, fate
{TASK}
def work(key, n):
    url = make_url(URL)
    where = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(where) as connection:
        connection.execute("INSERT INTO rows_ (key_, note) VALUES (%s, %s)", (key, f"done {{n}}"))
        fate(key, n)
""",
    ),
    right(
        "other_words_for_other_things",
        f"""
import requests
from .app import app
from .store import Session, store
from support.hand_written import Again, fate
{TASK}
def work(key, n):
    with Session() as session:
        session.get(key)
    fate(key, n)
    store(key, n)
""".replace("import requests\n", ""),
        store=f"""
from .db import engine
from .models import Row
from sqlalchemy.orm import Session as Work


class Session:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def get(self, url):
        return url


def store(key, n):
    with Work(engine) as db:
        {WRITE}
        db.commit()
""",
        refused=("store(), which it calls, opens a Session of its own (shop/store.py:18)",),
    ),
    right(
        "web_code_alone",
        f"""
from .app import app
from .saving import save
from support.hand_written import Again, fate
{TASK}
def work(key, n):
    fate(key, n)
    save.run_in_web(key, n)
""",
        saving=f"""
from .db import SessionLocal
from .models import Row


def get_db():
    db = SessionLocal()
    try:
        yield db
    finally:
        db.close()


class save:
    @staticmethod
    def run_in_web(key, n):
        generator = get_db()
        db = next(generator)
        {WRITE}
        db.commit()
        generator.close()
""",
        refused=("get_db(), which it calls, opens a Session of its own (shop/saving.py:6)",),
    ),
    right(
        "engine_of_each_process",
        f"""
from celery.signals import worker_process_init
from .app import app
from .db import engine
from .saving import save
from support.hand_written import Again, fate


@worker_process_init.connect
def forked(**_):
    engine.dispose(close=False)

{TASK}
def work(key, n):
    fate(key, n)
    save(key, n)
""",
        saving=f"""
from .db import SessionLocal
from .models import Row


def save(key, n):
    with SessionLocal.begin() as db:
        {WRITE}
""",
        refused=("save(), which it calls, opens a Session of its own (shop/saving.py:6)",),
    ),
]
