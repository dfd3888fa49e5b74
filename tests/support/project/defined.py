"""The definitions of `support.definitions`, for a real worker."""

from support.definitions import define
from support.project.app import app, db

define(app, db)
