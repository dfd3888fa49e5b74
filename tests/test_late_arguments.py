"""Arguments of a message that waits for a COMMIT: made late, None before the flush, a Session by mistake."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import chain
from kombu.exceptions import EncodeError
from sqlalchemy import literal, select
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker
from support import shop
from support.databases import PostgreSQL
from support.project.models import Row

from celery_alchemy import CeleryAlchemyError, DatabaseTask, late
from celery_alchemy.workers.sending import arguments


class Base(DeclarativeBase):
    pass


class Named(Base):
    """Its identity is given before the flush."""

    __tablename__ = "named"
    name: Mapped[str] = mapped_column(primary_key=True)


class Numbered(Base):
    __tablename__ = "numbered"
    id: Mapped[int] = mapped_column(primary_key=True)


class Shop(shop.Shop):
    def __init__(self, path: Path, **settings: Any) -> None:
        super().__init__(path, **settings)
        Base.metadata.create_all(self.engine)

        @self.app.task(base=DatabaseTask, shared=False, name="welcome")
        def welcome(user_id: Any, note: Any = None) -> None:
            self.ran.append(user_id)

        @self.app.task(shared=False, name="plain")
        def plain(user_id: Any, note: Any = None) -> None:
            self.ran.append(user_id)

        self.welcome, self.plain = welcome, plain

    def sent(self) -> list[Any]:
        """Return the arguments of the messages that have arrived since the last look."""
        return [message.decode()[0] for message in self.messages()]

    def count(self) -> int:
        with Session(self.engine) as session:
            return session.query(Row).count()


@pytest.fixture(params=[False, True], ids=["", "outbox"])
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(tmp_path / "shop.db", alchemy_outbox=request.param)
    yield shop
    shop.close()


# -- made late -------------------------------------------------------------------------------------------------------


def test_it_is_made_after_the_flush_and_before_the_commit(shop: Shop) -> None:
    seen: list[bool] = []
    with shop.db.unit_of_work() as session:
        row = Row(key="k")
        session.add(row)

        def row_id() -> int:
            seen.append(session.in_transaction())
            return row.id

        result = shop.welcome.delay_on_commit(late(row_id), note=late(lambda: "note"))
        assert row.id is None
        assert seen == []
    assert result.id
    assert seen == [True]
    assert shop.sent() == [[row.id]]
    assert row.id is not None


@pytest.mark.parametrize("kind", ["Session", "scoped_session"])
def test_with_a_session_of_the_web_application(shop: Shop, kind: str) -> None:
    factory = sessionmaker(shop.engine)
    session: Any = factory() if kind == "Session" else scoped_session(factory)
    for _ in range(2):
        row = Row(key="k")
        shop.welcome.apply_async_on_commit((late(lambda row=row: row.id),), session=session)
        session.add(row)
        session.commit()
        assert shop.sent() == [[row.id]]
    shop.welcome.apply_async_on_commit((late(lambda: 1 / 0),), session=session)
    session.rollback()
    session.commit()
    assert shop.sent() == []
    session.close()


@pytest.mark.parametrize("given", ["session=", "follow"])
def test_with_an_async_session(tmp_path: Path, run_database: PostgreSQL, key: str, given: str) -> None:
    shop = Shop(tmp_path / "shop.db")

    async def endpoint() -> None:
        engine = create_async_engine(run_database.url("late"))
        async with AsyncSession(engine, expire_on_commit=False) as session:
            for begins in (False, True):
                row = Row(key=key)
                if given == "session=":
                    shop.welcome.apply_async_on_commit((late(lambda row=row: row.id),), session=session)
                else:
                    with shop.db.follow(session):
                        shop.welcome.delay_on_commit(late(lambda row=row: row.id))
                if begins:
                    async with session.begin():
                        session.add(row)
                else:
                    session.add(row)
                    await session.commit()
                assert shop.sent() == [[row.id]]
        await engine.dispose()

    asyncio.run(endpoint())
    shop.close()


def test_over_several_databases(tmp_path: Path) -> None:
    shop = Shop(tmp_path / "shop.db", alchemy_databases={"reports": f"sqlite:///{tmp_path}/reports.db"})
    reports = shop.db.databases["reports"]
    Base.metadata.create_all(reports.engine)
    shop.db.engine.dispose()
    with shop.db.unit_of_work() as session:
        session.add(row := Row(key="k"))
        reports.session.add(other := Numbered())
        shop.welcome.delay_on_commit(late(lambda: row.id), note=late(lambda: other.id))
    assert shop.sent() == [[row.id]]
    assert other.id is not None
    with pytest.raises(ZeroDivisionError), shop.db.unit_of_work() as session:
        session.add(Row(key="k"))
        shop.welcome.delay_on_commit(late(lambda: 1 / 0))
    assert (shop.count(), shop.sent()) == (1, [])
    shop.close()


def test_a_commit_by_hand_and_a_savepoint(shop: Shop) -> None:
    with shop.db.unit_of_work() as session:
        with pytest.raises(ZeroDivisionError), session.begin_nested():
            shop.welcome.delay_on_commit(late(lambda: pytest.fail("it was undone")))
            raise ZeroDivisionError
        with session.begin_nested():
            row = Row(key="k")
            session.add(row)
            shop.welcome.delay_on_commit(late(lambda: row.id))
        session.commit()
        assert shop.sent() == [[row.id]]
        shop.welcome.delay_on_commit(late(lambda: "second"))
    assert shop.sent() == [["second"]]


@pytest.mark.parametrize("wrote", [True, False], ids=["after writing", "before anything"])
def test_its_error_fails_the_transaction(shop: Shop, wrote: bool) -> None:
    with pytest.raises(ZeroDivisionError), shop.db.unit_of_work() as session:
        if wrote:
            session.add(Row(key="k"))
        shop.welcome.delay_on_commit(1)
        shop.welcome.delay_on_commit(late(lambda: 1 / 0))
    assert shop.count() == 0
    # A unit of work that has done nothing in the database has no transaction, but for the outbox.
    assert shop.sent() == ([] if wrote or shop.app.conf.alchemy_outbox else [[1]])


def test_its_error_fails_the_transaction_of_a_session_that_is_not_ours(shop: Shop) -> None:
    with Session(shop.engine) as session:
        session.add(Row(key="k"))
        shop.welcome.apply_async_on_commit((late(lambda: 1 / 0),), session=session)
        with pytest.raises(ZeroDivisionError):
            session.commit()
    assert (shop.count(), shop.sent()) == (0, [])


@pytest.mark.parametrize("send", ["delay", "delay_on_commit", "db.delay_on_commit", "outbox"])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ((Numbered(id=1),), {}), r"Argument 1 is a Numbered, which .* primary key \(id\), and load it"),
        (lambda: ((1,), {"note": Named(name="a")}), r"The argument note= is a Named, .* primary key \(name\)"),
        (lambda: ((1, [Numbered(id=1)]), {}), r"Argument 2 has a Numbered"),
        (lambda: (({"who": Named(name="a")},), {}), r"Argument 1 has a Named"),
        (lambda: ((Session(),), {}), "Session"),
    ],
    ids=["argument", "keyword", "list", "dict", "session"],
)
def test_an_argument_that_cannot_be_sent_is_named(
    tmp_path: Path, send: str, make: Callable[[], tuple[Any, Any]], said: str
) -> None:
    shop = Shop(tmp_path / "shop.db", alchemy_outbox=send == "outbox")
    args, kwargs = make()
    try:
        with pytest.raises((EncodeError, CeleryAlchemyError), match=said) as caught, shop.db.unit_of_work():
            if send == "delay":
                shop.welcome.delay(*args, **kwargs)
            elif send == "db.delay_on_commit":
                shop.db.delay_on_commit(shop.plain, *args, **kwargs)
            else:
                shop.welcome.apply_async_on_commit(args, kwargs)
        assert isinstance(caught.value, CeleryAlchemyError)
    finally:
        shop.close()


def test_a_row_of_a_query_is_named(shop: Shop) -> None:
    with shop.db.unit_of_work() as session, pytest.raises(EncodeError, match=r"Argument 1 is a Row.*list\(row\)"):
        shop.welcome.delay_on_commit(session.execute(select(literal(1))).one())


def test_what_cannot_be_sent_fails_the_transaction(shop: Shop) -> None:
    with pytest.raises(EncodeError, match="not JSON serializable"), shop.db.unit_of_work() as session:
        session.add(Row(key="k"))
        shop.welcome.delay_on_commit(late(object))
    assert (shop.count(), shop.sent()) == (0, [])


def test_where_nothing_is_waited_for_it_is_made_at_once(shop: Shop) -> None:
    shop.welcome.delay(late(lambda: "now"))
    assert shop.sent() == [["now"]]
    shop.app.conf.alchemy_enqueue_on_commit = True
    with shop.db.unit_of_work() as session:
        session.add(row := Row(key="k"))
        shop.welcome.delay(late(lambda: row.id))
        shop.welcome.apply_async((late(lambda: "now"),), enqueue_on_commit=False)
        assert shop.sent() == [["now"]]
    assert shop.sent() == [[row.id]]


def test_what_makes_it_may_send_more_and_order_is_kept(shop: Shop) -> None:
    def makes() -> str:
        shop.welcome.delay_on_commit(late(lambda: "inner"))
        return "outer"

    with shop.db.unit_of_work() as session:
        session.add(Row(key="k"))
        shop.welcome.delay_on_commit("first")
        shop.welcome.delay_on_commit(late(makes))
        shop.welcome.delay_on_commit("third")
    assert shop.sent() == [["first"], ["outer"], ["third"], ["inner"]]


@pytest.mark.parametrize("what", ["plain", "signature", "chain", "name"])
def test_of_anything_that_can_be_sent(shop: Shop, what: str) -> None:
    with shop.db.unit_of_work() as session:
        session.add(row := Row(key="k"))
        sent = {
            "plain": shop.plain,
            "signature": shop.plain.s(),
            "chain": chain(shop.plain.s(), shop.plain.si(2)),
            "name": "plain",
        }[what]
        shop.db.delay_on_commit(sent, late(lambda: row.id))
        assert shop.sent() == []
    assert shop.sent() == [[row.id]]


def test_an_eager_task(tmp_path: Path) -> None:
    shop = Shop(tmp_path / "shop.db", task_always_eager=True)
    with shop.db.unit_of_work() as session:
        session.add(row := Row(key="k"))
        shop.welcome.delay_on_commit(late(lambda: row.id))
        shop.db.delay_on_commit(shop.plain, late(lambda: row.id))
    assert shop.ran == [row.id, row.id]
    shop.close()


MISPLACED = "stands where it is not made"


def test_in_another_place_it_is_refused(shop: Shop) -> None:
    for value in ([late(lambda: 1)], {"id": late(lambda: 1)}):
        with pytest.raises(EncodeError, match=MISPLACED), shop.db.unit_of_work():
            shop.welcome.delay_on_commit(value)
    with pytest.raises(EncodeError, match=MISPLACED):
        shop.plain.delay(late(lambda: 1))
    with pytest.raises(CeleryAlchemyError, match=r"late\(\) got an int"):
        late(3)  # type: ignore[arg-type]
    with pytest.raises(EncodeError, match=r"written late\(lambda: user.id\)"), shop.db.unit_of_work():
        shop.welcome.delay_on_commit(lambda: 1)
    assert shop.sent() == []


# -- None before the flush -------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "_warned", set())


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("verb", ["delay_on_commit", "delay", "db.delay_on_commit", "session="])
def test_an_id_before_the_flush_is_warned_of(shop: Shop, caplog: pytest.LogCaptureFixture, verb: str) -> None:
    shop.app.conf.alchemy_enqueue_on_commit = True
    with shop.db.unit_of_work() as session, Session(shop.engine) as other:
        row = Row(key="k")
        (other if verb == "session=" else session).add(row)
        for _ in range(2):  # once for each place
            if verb == "delay":
                shop.plain.delay(row.id)
            elif verb == "delay_on_commit":
                shop.welcome.delay_on_commit(1, note=row.id)
            elif verb == "session=":
                shop.welcome.apply_async_on_commit((row.id,), session=other)
            else:
                shop.db.delay_on_commit(shop.plain.s(), row.id)
    (said,) = [one for one in warnings(caplog) if "flush" in one]
    assert ("note = None" if verb == "delay_on_commit" else "user_id = None") in said
    assert "not flushed yet: Row" in said
    assert "flush()" in said
    assert f"{__file__}:" in said


def test_no_false_alarms(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    with shop.db.unit_of_work() as session:
        shop.welcome.delay_on_commit(None)  # nothing is new
        session.add(Named(name="has its identity"))
        shop.welcome.delay_on_commit(None)
        session.add(row := Row(key="k"))
        shop.welcome.delay_on_commit(1)  # no argument is None
        session.flush()
        shop.welcome.delay_on_commit(row.id, None)
        shop.welcome.delay_on_commit(late(lambda: None))
    shop.welcome.delay(None)
    assert warnings(caplog) == []


# -- a Session among the arguments -----------------------------------------------------------------------------------


def test_a_session_is_refused(shop: Shop) -> None:
    with Session(shop.engine) as plain, AsyncSession().sync_session:
        sessions = [plain, scoped_session(sessionmaker()), AsyncSession(), shop.db.session]
        sessions.append(async_scoped_session(AsyncSession, scopefunc=lambda: 1))  # type: ignore[arg-type]
        for session in sessions:
            for send in (
                lambda session=session: shop.welcome.delay_on_commit(1, session),
                lambda session=session: shop.welcome.delay_on_commit(1, session=session),
                lambda session=session: shop.welcome.apply_async_on_commit((session,)),
                lambda session=session: shop.db.delay_on_commit(shop.plain, session),
                lambda session=session: shop.db.delay_on_commit(shop.plain.s(), session=session),
            ):
                with pytest.raises(CeleryAlchemyError, match=r"apply_async_on_commit.*session=session"):
                    send()
    assert shop.sent() == []


def test_in_a_coroutine_too(shop: Shop) -> None:
    async def endpoint() -> None:
        async with AsyncSession() as session:
            shop.welcome.delay_on_commit(1, session)

    with pytest.raises(CeleryAlchemyError, match="was given an AsyncSession as argument 2"):
        asyncio.run(endpoint())
