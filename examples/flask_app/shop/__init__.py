"""Flask with Flask-SQLAlchemy and an application factory: a view commits, and the task that it has sent runs then.

pip install "../..[postgresql]" "celery[redis]" Flask-SQLAlchemy
flask --app shop create-tables
celery -A shop.worker worker --loglevel=INFO
flask --app shop run
curl -X POST localhost:5000/users/ada
curl localhost:5000/users
"""

import os

from flask import Flask

from . import views
from .extensions import app, db


def create_app() -> Flask:
    """Make the web application; it configures the Celery app as well, for the views send tasks."""
    flask_app = Flask(__name__)
    url = os.environ.get("SHOP_DATABASE_URL", "postgresql+psycopg://localhost/shop")
    flask_app.config["SQLALCHEMY_DATABASE_URI"] = url
    db.init_app(flask_app)
    app.conf.alchemy_database_url = url  # tasks have an Engine of their own, sized for their worker pool
    flask_app.register_blueprint(views.blueprint)
    return flask_app
