"""What the modules of the shop share. Nothing here is configured or connected yet."""

import os

from celery import Celery
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase

from celery_alchemy import Alchemy


class Base(DeclarativeBase):
    pass


db = SQLAlchemy(model_class=Base)

app = Celery("shop", broker=os.environ.get("SHOP_BROKER", "redis://localhost"))
Alchemy(app).share(db.session)  # in a task it is the task's Session; in a view, messages wait for its COMMIT
