"""An Engine made and used before the monkey patch, as a module's top level does. EARLY_URL is its database."""

import os

from celery import Celery
from sqlalchemy import create_engine, text

from celery_alchemy import Alchemy

app = Celery("early", set_as_current=False)
if os.environ["EARLY_WHOSE"] == "engine":
    engine = create_engine(os.environ["EARLY_URL"], pool_size=5, max_overflow=0)
    db = Alchemy(app, engine=engine)
else:
    app.conf.alchemy_database_url = os.environ["EARLY_URL"]
    app.conf.alchemy_engine_options = {"pool_size": 5}
    db = Alchemy(app)
    engine = db.engine
with engine.connect() as one, engine.connect() as two:
    for connection in (one, two):
        connection.execute(text("SELECT 1"))
