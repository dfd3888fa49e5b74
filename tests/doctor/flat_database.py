"""Beside the module of the tasks: what they use."""

import os

from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

engine = create_engine(os.environ["DOCTOR_URL"])
make_session = sessionmaker(bind=engine)


def get_session():
    return make_session()
