"""Flask-SQLAlchemy's `db.session`, shared once: what a view sends "on commit" waits for the COMMIT of its request."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, abort, g
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import text
from sqlalchemy.orm import Session
from support.databases import PostgreSQL
from support.project.models import Row
from support.shop import Shop

from celery_alchemy import NoUnitOfWork


class Site:
    """A Flask application on PostgreSQL with one view, which does what a test wants."""

    def __init__(self, shop: Shop, url: str) -> None:
        self.shop, self.body = shop, (lambda: None)
        self.flask = Flask("shop")
        self.flask.config["SQLALCHEMY_DATABASE_URI"] = url
        self.db = SQLAlchemy(self.flask)
        shop.db.share(self.db.session)
        self.flask.post("/")(self.view)

    def view(self) -> list[str]:
        assert self.shop.sent() == []
        self.body()
        return self.shop.sent()

    def post(self, body: Callable[[], None]) -> Any:
        self.body = body
        return self.flask.test_client().post("/")


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(tmp_path / "shop.db")
    yield shop
    shop.close()


@pytest.fixture
def site(shop: Shop, run_database: PostgreSQL) -> Iterator[Site]:
    site = Site(shop, run_database.url("flask"))
    yield site
    with site.flask.app_context():
        site.db.engine.dispose()


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.name.startswith("celery_alchemy")]


@pytest.mark.parametrize("before", ["nothing", "a statement", "a new row"])
@pytest.mark.parametrize("how", ["delay_on_commit", "on_commit", "setting"])
def test_a_view(site: Site, shop: Shop, before: str, how: str, caplog: pytest.LogCaptureFixture) -> None:
    session = site.db.session
    shop.app.conf.alchemy_enqueue_on_commit = how == "setting"

    def send() -> None:
        if before == "a statement":
            session.execute(text("SELECT 1"))
        elif before == "a new row":
            session.add(Row(key="flask"))
        if how == "delay_on_commit":
            shop.rename.delay_on_commit("ada")
        elif how == "on_commit":
            shop.db.on_commit(lambda: shop.rename.delay("ada"))
        else:
            shop.rename.delay("ada")
        session.execute(text("SELECT 1"))

    def ends(end: Callable[[], object]) -> Callable[[], None]:
        def body() -> None:
            send()
            end()

        return body

    for _ in range(2):
        assert len(site.post(ends(session.commit)).json) == 1
    if how == "setting" and before == "nothing":
        return  # nothing is open yet: it is no part of the transaction
    assert site.post(ends(session.rollback)).json == []
    assert shop.sent() == []
    assert not ours(caplog)
    for end in (lambda: abort(418), lambda: 1 // 0):
        assert site.post(ends(end)).status_code in {418, 500}
        if how == "setting" and before == "a statement":
            shop.sent()  # nothing was written, so nothing is lost
        assert shop.sent() == []
    assert not ours(caplog), "that a request which has failed is rolled back is no news"
    assert site.post(send).json == []
    assert len(ours(caplog)) == (not (how == "setting" and before == "a statement")), "the next one has not failed"


def test_a_view_that_never_commits(site: Site, shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "celery_alchemy"):
        assert site.post(lambda: shop.rename.delay_on_commit("ada")).json == []
    assert shop.sent() == []
    (said,) = ours(caplog)
    assert f"sending {shop.rename.name}[" in said
    assert "Call commit() before its end, even where nothing was written" in said


def test_by_the_setting_a_view_that_only_reads_sends_at_its_end(
    site: Site, shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    """It has nothing to commit, and it has called `delay()`."""
    shop.app.conf.alchemy_enqueue_on_commit = True
    session = site.db.session

    def reads() -> None:
        session.execute(text("SELECT 1"))
        shop.rename.delay("ada")
        session.query(Row).all()

    for _ in range(2):
        assert site.post(reads).json == []
        assert len(shop.sent()) == 1
    assert not ours(caplog)

    def writes(flush: Callable[[], None]) -> Callable[[], None]:
        def body() -> None:
            reads()
            session.add(Row(key="flask"))
            flush()

        return body

    for flush in (session.flush, lambda: None):
        assert site.post(writes(flush)).json == []
        assert shop.sent() == []
    assert len(ours(caplog)) == 2


@pytest.mark.parametrize("fails", [lambda: abort(418), lambda: 1 // 0, None])
def test_a_followed_session(site: Site, shop: Shop, fails: Callable[[], object] | None, caplog: Any) -> None:
    """Its hook is not told of an exception that was answered."""

    @site.flask.before_request
    def follow() -> None:
        g.session = Session(shop.engine)
        g.block = shop.db.follow(g.session)
        g.block.__enter__()

    @site.flask.teardown_request
    def ends(error: BaseException | None) -> None:
        g.block.__exit__(type(error), error, None)
        g.session.close()

    def body() -> None:
        shop.rename.delay_on_commit("ada")
        g.session.execute(text("SELECT 1"))
        if fails is not None:
            fails()

    site.post(body)
    assert shop.sent() == []
    assert len(ours(caplog)) == (fails is None)


def test_without_an_application_context_there_is_nothing_to_wait_for(site: Site, shop: Shop) -> None:
    shop.app.conf.alchemy_on_commit_outside = "raise"
    with pytest.raises(NoUnitOfWork):
        shop.rename.delay_on_commit("ada")
    with site.flask.app_context():
        shop.rename.delay_on_commit("ada")
        site.db.session.commit()
    assert len(shop.sent()) == 1


def test_in_a_unit_of_work_its_commit_counts(site: Site, shop: Shop) -> None:
    def body() -> None:
        with shop.db.unit_of_work():
            shop.rename.delay_on_commit("ada")
        assert len(shop.sent()) == 1
        site.db.session.rollback()

    assert site.post(body).json == []
