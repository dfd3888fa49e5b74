"""An Engine that is given, smaller than what the worker pool wants."""

import json
import os

from celery import Celery
from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, sessionmaker
from sqlalchemy.pool import NullPool

from celery_alchemy import Alchemy

app = Celery("shop", broker="redis://localhost")
options = json.loads(os.environ["DOCTOR_SETTINGS"])


class Base(DeclarativeBase):
    pass


def make(name):
    given = options.get(name, {})
    return create_engine(os.environ["DOCTOR_URL"], **given | ({"poolclass": NullPool} if "poolclass" in given else {}))


main_engine = make("main")
other_engine = make("other")
db = Alchemy(app, engine=main_engine, session_factory=sessionmaker(binds={Base: other_engine}))
