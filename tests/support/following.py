"""A web application's Session, how a request follows it, and the ways to send on commit."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from .shop import Shop


class Web:
    """A web application's Session, and how its requests are told of to the Alchemy."""

    def __init__(self, shop: Shop, how: str) -> None:
        self.shop = shop
        self.sessions = scoped_session(sessionmaker(shop.engine), scopefunc=lambda: 1)
        self.how = how
        if how == "shared":
            shop.db.share(self.sessions)

    def __enter__(self) -> Any:
        self._block = None
        if self.how == "shared":
            return self.sessions
        self.session = Session(self.shop.engine)
        followed = self.session if self.how == "Session" else AsyncSession(sync_session_class=lambda **_: self.session)
        self._block = self.shop.db.follow(followed)
        self._block.__enter__()
        return self.session

    def __exit__(self, *exc_info: Any) -> None:
        if self._block is not None:
            self._block.__exit__(*exc_info)
            self.session.close()
        self.sessions.remove()


def said(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Return what we have logged."""
    return [record for record in caplog.records if record.name.startswith("celery_alchemy.")]


Send = Callable[[Shop], Any]


def by_delay(shop: Shop) -> Any:
    return shop.rename.delay_on_commit("ada").id


def by_options(shop: Shop) -> Any:
    return shop.rename.apply_async_on_commit(("ada",)).id


def by_callback(shop: Shop) -> Any:
    shop.db.on_commit(lambda: shop.rename.apply_async(("ada",), task_id="called"))
    return "called"


ASKED = [by_delay, by_options, by_callback]
