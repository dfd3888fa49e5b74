"""Two-phase commit: all databases commit, or none."""

from pathlib import Path

import pytest
from sqlalchemy import make_url, select, text
from support import databases
from support.apps import Isolated
from support.databases import Database, PostgreSQL
from support.project.models import Row
from support.several import MODULES, settings
from support.two_phase import app_with, engines_of, write_both
from support.waiting import eventually
from support.worker import Site, Worker, running

from celery_alchemy import Alchemy, ConfigurationError
from celery_alchemy.loadtests.services.proxy import CountingProxy
from celery_alchemy.strategies.several import in_doubt
from celery_alchemy.strategies.several.two_phase import CannotAgree, TwoPhaseUnavailable


def test_both_commit(pair: tuple[Database, Database], key: str) -> None:
    with app_with(pair[0].url("two"), pair[1].url("two")) as db:
        write_both(db, key)
        assert [database.rows(key) for database in pair] == [["written"]] * 2
        assert in_doubt.find({name: one.engine for name, one in db.databases.items()}) == []


@pytest.mark.parametrize("fails", ["default", "reports"])
def test_a_commit_that_one_refuses_is_none(here: PostgreSQL, beside: PostgreSQL, key: str, fails: str) -> None:
    """A deferred constraint is checked when the transaction is prepared."""
    with app_with(here.url("two"), beside.url("two")) as db:
        with pytest.raises(Exception, match="children_parent_id_fkey"):
            write_both(db, key, fails=fails)
        assert [here.rows(key), beside.rows(key)] == [[], []]
        assert here.column("SELECT gid FROM pg_prepared_xacts") == []
        write_both(db, key)
        assert [here.rows(key), beside.rows(key)] == [["written"]] * 2


@pytest.mark.parametrize("by_hand", ["commit", "rollback"])
def test_one_that_is_ended_by_hand_begins_again(pair: tuple[Database, Database], key: str, by_hand: str) -> None:
    """Its next transaction is committed with the other's, or none is."""
    agrees = isinstance(pair[0], databases.MariaDB) or isinstance(pair[1], PostgreSQL)
    with app_with(*[one.url("two") for one in pair]) as db:

        def work() -> None:
            with db.unit_of_work() as session:
                for one in (session, db.databases["reports"].session()):
                    one.add(Row(key=key, note="first"))
                    one.flush()
                getattr(session, by_hand)()
                session.add(Row(key=key, note="second"))

        if agrees:
            work()
        else:
            with pytest.raises(CannotAgree, match="by hand"):
                work()
        assert in_doubt.find(engines_of(db)) == []
    by_hand_rows = ["first"] if by_hand == "commit" else []
    assert sorted(pair[0].rows(key)) == by_hand_rows + (["second"] if agrees else [])
    assert pair[1].rows(key) == (["first"] if agrees else [])


def test_what_only_reads_after_a_commit_by_hand_agrees(pair: tuple[Database, Database], key: str) -> None:
    with app_with(*[one.url("two") for one in pair]) as db, db.unit_of_work() as session:
        for one in (session, db.databases["reports"].session()):
            one.add(Row(key=key, note="written"))
            one.flush()
        session.commit()
        assert session.scalars(select(Row).where(Row.key == key)).one()
    assert [one.rows(key) for one in pair] == [["written"]] * 2


def test_a_server_that_does_not_tell_who_it_is(here: PostgreSQL, beside: PostgreSQL, key: str) -> None:
    here.execute("CREATE ROLE untold LOGIN; GRANT ALL ON ALL TABLES IN SCHEMA public TO untold")
    here.execute("GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO untold")
    here.execute("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC")
    try:
        url = make_url(here.url("two")).set(username="untold").render_as_string(hide_password=False)
        with app_with(url, beside.url("two")) as db:
            with pytest.raises(TwoPhaseUnavailable, match="GRANT EXECUTE ON FUNCTION pg_control_system"):
                write_both(db, key)
            assert [here.rows(key), beside.rows(key)] == [[], []]
    finally:
        here.execute("GRANT EXECUTE ON FUNCTION pg_control_system() TO PUBLIC")
        here.execute("DROP OWNED BY untold; DROP ROLE untold")


def test_one_database_alone_pays_for_no_second_phase(here: PostgreSQL, beside: PostgreSQL, key: str) -> None:
    with (
        CountingProxy(make_url(here.url("two"))) as proxy,
        app_with(proxy.url.render_as_string(hide_password=False), beside.url("two")) as db,
    ):
        costs = []
        for explicit in (False, False, True):
            before = proxy.round_trips
            with db.unit_of_work() as session:
                session.execute(text("INSERT INTO rows_ (key_, note) VALUES (:key, 'one')"), {"key": key})
                if explicit:
                    session.commit()
            costs.append(proxy.round_trips - before)
        assert costs[1:] == [3, 3], "BEGIN, INSERT, COMMIT"
        assert here.rows(key) == ["one"] * 3


def test_a_database_without_two_phases_commits_between_them(here: PostgreSQL, tmp_path: Path, key: str) -> None:
    with databases.new_sqlite(tmp_path / "two.sqlite3") as file, app_with(file.url(""), here.url("two")) as db:
        write_both(db, key)
        assert [here.rows(key), file.rows(key)] == [["written"]] * 2
        file.execute("CREATE TRIGGER no BEFORE INSERT ON users BEGIN SELECT RAISE(ABORT, 'refused'); END")
        with pytest.raises(Exception, match="refused"), db.unit_of_work() as session:
            db.databases["reports"].session.add(Row(key=key, note="must not be there"))
            db.databases["reports"].session.flush()
            session.execute(text("INSERT INTO users (name) VALUES ('x')"))
        assert here.rows(key) == ["written"]


def test_two_databases_without_two_phases_are_refused(site: Site, here: PostgreSQL, tmp_path: Path) -> None:
    worker = Worker(
        site, "refused", "solo", database_url=f"sqlite:///{tmp_path}/a", modules=MODULES,
        settings={"alchemy_databases": {"reports": f"sqlite:///{tmp_path}/b"}, "alchemy_two_phase": True},
    )  # fmt: skip
    worker.start()
    eventually(lambda: not worker.is_running(), "it has ended", within_s=30)
    worker.stop()
    assert worker.exit_code()
    assert "'default' and 'reports' cannot prepare a transaction" in worker.log()


def test_a_server_that_prepares_nothing_says_so(run_database: PostgreSQL, there: PostgreSQL, key: str) -> None:
    if run_database.column("SHOW max_prepared_transactions") != ["0"]:
        pytest.skip("this server prepares transactions")
    with app_with(run_database.url("two"), there.url("two")) as db:
        with pytest.raises(Exception, match="Set max_prepared_transactions"):
            write_both(db, key)
        assert [run_database.rows(key), there.rows(key)] == [[], []]


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "eventlet", "solo"])
def test_under_every_worker_pool(site: Site, here: PostgreSQL, beside: PostgreSQL, key: str, pool: str) -> None:
    name = f"{site.prefix[:-1]}-two-{pool}"
    both = settings(beside) | {"alchemy_two_phase": True}
    worker = Worker(site, name, pool, database_url=here.url(name), modules=MODULES, settings=both)
    with running(worker):
        for ending in ("returns", "raises", "commit fails here", "commit fails there", "retry", "broken there"):
            outcome = worker.call("end_both", f"{key[:20]}-{ending}", ending)
            assert outcome.state == ("SUCCESS" if ending in {"returns", "retry"} else "FAILURE"), outcome
            kept = ending == "returns"
            assert here.rows(f"{key[:20]}-{ending}") == (["here"] if kept else [])
            assert beside.rows(f"{key[:20]}-{ending}") == (["there"] if kept else [])
        assert "a unit of work commits all or none (two-phase)" in worker.log()
        assert here.column("SELECT gid FROM pg_prepared_xacts") == []
        databases.assert_not_busy(here, name)


def test_bad_settings() -> None:
    app = Isolated("bad", broker="memory://", set_as_current=False)
    app.conf.update(alchemy_database_url="sqlite://", alchemy_two_phase="yes")
    with pytest.raises(ConfigurationError, match="alchemy_two_phase is 'yes', but it must be True or False"):
        Alchemy(app).settings  # noqa: B018
