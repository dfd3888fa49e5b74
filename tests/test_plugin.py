"""The pytest plugin, used by test modules of its own: with xdist, asyncio, Celery's worker in a thread, the docs'."""

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text
from support.databases import PostgreSQL
from support.docs import DOCS, blocks

INI = """[pytest]
addopts = -p no:locust -p no:cacheprovider -q
asyncio_default_fixture_loop_scope = function
filterwarnings = error
"""
Run = Callable[..., str]


@pytest.fixture(params=["postgresql", "sqlite"])
def url(request: pytest.FixtureRequest, run_database: PostgreSQL, tmp_path: Path, run_name: str) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/shop.sqlite3"
    # A schema of its own: the shop has a table called users too.
    schema = f"plugin_{tmp_path.name}".replace("-", "_")[:50].lower()
    run_database.execute(f'CREATE SCHEMA "{schema}"')
    url = make_url(run_database.url("plugin")).update_query_dict({"options": f"-csearch_path={schema}"})
    return url.render_as_string(hide_password=False)


@pytest.fixture
def shop(url: str, tmp_path: Path) -> Path:
    """A project: the tutorial's shop, and an empty test suite."""
    code = "\n".join(block for block in pages("tutorial.md") if not block.startswith("from shop import"))
    code = code.replace("postgresql+psycopg://localhost/shop", url).replace("redis://localhost", "memory://")
    (tmp_path / "shop.py").write_text(code)
    (tmp_path / "conftest.py").write_text(block_with(pages("testing.md"), "# conftest.py"))
    (tmp_path / "pytest.ini").write_text(INI)
    return tmp_path


def pages(page: str) -> list[str]:
    return blocks((DOCS / page).read_text(encoding="utf-8"), "python")


def block_with(found: list[str], words: str) -> str:
    return next(block for block in found if words in block)


@pytest.fixture
def run(shop: Path) -> Run:
    def run_tests(code: str, *arguments: str, fails: bool = False) -> str:
        (shop / "test_shop.py").write_text(textwrap.dedent(code))
        command = [sys.executable, "-m", "pytest", *arguments]
        done = subprocess.run(command, cwd=shop, capture_output=True, text=True, timeout=250, check=False)
        assert (done.returncode != 0) is fails, done.stdout + done.stderr
        return done.stdout

    return run_tests


def rows(url: str) -> int:
    engine = create_engine(url)
    with engine.connect() as connection:
        count = connection.scalar(text("SELECT count(*) FROM users"))
    engine.dispose()
    return int(count or 0)


def test_the_docs_tests_pass_and_leave_nothing(run: Run, url: str) -> None:
    assert "5 passed" in run(block_with(pages("testing.md"), "# test_shop.py"))
    assert rows(url) == 0


def test_they_pass_in_several_processes(run: Run, url: str, shop: Path) -> None:
    if url.startswith("sqlite"):
        pytest.skip("a file lets one process write at a time")
    make = "import shop; shop.Base.metadata.create_all(shop.db.engine)"  # two processes at once would be in the way
    subprocess.run([sys.executable, "-c", make], cwd=shop, timeout=250, check=True)
    assert "5 passed" in run(block_with(pages("testing.md"), "# test_shop.py"), "-n", "2")
    assert rows(url) == 0


def test_everything_is_in_one_transaction(run: Run, url: str) -> None:
    code = """
        import threading
        import pytest
        from celery_alchemy import DatabaseTask
        from shop import User, app, create, db

        @app.task(base=DatabaseTask, bind=True)
        def nest(self, name):
            self.db.add(User(name=name))
            self.db.commit()
            create.apply((name + " inner",)).get()
            with db.unit_of_work() as session:
                session.add(User(name=name + " block"))

        @app.task(base=DatabaseTask, bind=True, max_retries=2)
        def retrying(self, name):
            self.db.add(User(name=f"{name} {self.request.retries}"))
            self.db.flush()
            if self.request.retries < 2:
                raise self.retry(countdown=0)

        @app.task(base=DatabaseTask, bind=True)
        def failing_late(self, name):
            self.db.add(User(name=name))
            self.db.commit()
            self.db.add(User(name=name + " too late"))
            self.db.flush()
            raise ZeroDivisionError

        def names(session):
            return sorted(user.name for user in session.query(User))

        @pytest.mark.parametrize("again", [1, 2])
        def test_nested(alchemy_session, again):
            nest.apply(("a",)).get()
            assert names(alchemy_session) == ["a", "a block", "a inner"]

        def test_retries(alchemy_session):
            retrying.apply(("r",))
            assert names(alchemy_session) == ["r 2"]

        def test_what_was_committed_stays(alchemy_session):
            failing_late.apply(("kept",))
            assert names(alchemy_session) == ["kept"]

        def test_like_a_function(alchemy_session):
            create("x")
            assert names(alchemy_session) == ["x"]

        def test_web_code(alchemy_session):
            db.session.add(User(name="web"))
            db.session.commit()
            create.apply(("task",)).get()
            db.session.add(User(name="undone"))
            db.session.flush()
            db.session.rollback()
            assert names(alchemy_session) == ["task", "web"]

        def test_a_thread_of_a_web_server(alchemy_session):
            def handle():
                with db.unit_of_work() as session:
                    session.add(User(name="thread"))
            thread = threading.Thread(target=handle)
            thread.start()
            thread.join()
            assert names(alchemy_session) == ["thread"]

        def test_reading(alchemy_session):
            from shop import how_many
            create.apply(("x",)).get()
            assert how_many.apply().get() == 1

        def test_once_only(alchemy_session):
            with pytest.raises(Exception, match="open already"):
                with db.one_transaction():
                    pass

        def test_afterwards(alchemy):
            with alchemy.unit_of_work() as session:
                assert names(session) == []
            assert not alchemy.in_unit_of_work
            assert alchemy.engine.pool.checkedout() == 0
        """
    assert "10 passed" in run(code)
    assert rows(url) == 0


def test_celerys_worker_in_a_thread(run: Run, url: str) -> None:
    code = """
        import pytest
        from celery.contrib.testing.worker import start_worker
        from shop import User, app, create, db, register, rename_user

        @pytest.fixture
        def worker(alchemy_session):
            app.conf.update(result_backend="cache+memory://", broker_url="memory://", worker_hijack_root_logger=False)
            with start_worker(app, perform_ping_check=False, shutdown_timeout=20) as worker:
                yield worker

        @pytest.mark.parametrize("again", [1, 2])
        @pytest.mark.filterwarnings("ignore")
        def test_tasks_in_the_worker(worker, alchemy_session, again):
            create.delay("ada").get(timeout=20)
            assert alchemy_session.query(User).one().name == "ada"
            register.delay("alan").get(timeout=20)
            for _ in range(100):
                alchemy_session.expire_all()
                if alchemy_session.query(User).filter_by(name="Alan").count():
                    break
                import time; time.sleep(0.1)
            assert sorted(user.name for user in alchemy_session.query(User)) == ["Alan", "ada"]
        """
    assert "2 passed" in run(code)
    assert rows(url) == 0


def test_celerys_own_fixtures(run: Run, shop: Path, url: str) -> None:
    """`celery_app` and `celery_worker`: an app in memory, made for each test, and its worker in a thread."""
    (shop / "conftest.py").write_text(
        textwrap.dedent(f"""
        import pytest
        from celery import shared_task
        from celery_alchemy import Alchemy, DatabaseTask
        from sqlalchemy import text

        pytest_plugins = ["celery.contrib.pytest"]

        @shared_task(base=DatabaseTask, bind=True, name="insert")
        def insert(self, name):
            self.db.execute(text("INSERT INTO users (name) VALUES (:name)"), {{"name": name}})

        @pytest.fixture(scope="session")
        def celery_config():
            return {{"alchemy_database_url": {url!r}}}

        @pytest.fixture
        def alchemy(celery_app):
            from shop import Base
            db = Alchemy(celery_app)
            Base.metadata.create_all(db.engine)
            yield db
            db.stop()

        @pytest.fixture
        def celery_worker_parameters():
            return {{"perform_ping_check": False, "shutdown_timeout": 20}}
        """)
    )
    code = """
        import pytest
        from sqlalchemy import text

        @pytest.mark.parametrize("again", [1, 2])
        @pytest.mark.filterwarnings("ignore")
        def test_a_task(alchemy_session, celery_app, celery_worker, again):
            celery_app.tasks["insert"].delay("ada").get(timeout=20)
            assert alchemy_session.scalars(text("SELECT name FROM users")).all() == ["ada"]
        """
    assert "2 passed" in run(code)
    assert rows(url) == 0


def test_enqueued(run: Run) -> None:
    code = """
        import pytest
        from celery import group
        from shop import User, app, create, db, register, rename_user, welcome

        def test_on_commit_and_at_once(alchemy_session, alchemy_enqueued):
            register.apply(("alan",)).get()
            create.apply_async(("now",), queue="slow", countdown=7)
            assert [message.name for message in alchemy_enqueued] == [rename_user.name, create.name]
            message = alchemy_enqueued.assert_enqueued(create, args=["now"], kwargs={}, queue="slow", countdown=7)
            assert message.options["queue"] == "slow"

        def test_dropped_with_the_rollback(alchemy_session, alchemy_enqueued):
            with pytest.raises(ZeroDivisionError), db.unit_of_work():
                rename_user.delay_on_commit("a", "b")
                1 / 0
            alchemy_enqueued.assert_not_enqueued(rename_user)
            rename_user.delay_on_commit("a", "b")  # of the test's own
            assert len(alchemy_enqueued) == 0
            db.session.commit()
            alchemy_enqueued.assert_enqueued(rename_user, ("a", "b"))
            alchemy_enqueued.clear()
            rename_user.delay_on_commit("never", "committed")

        def test_canvas(alchemy_enqueued):
            result = group(create.s("a"), create.s("b")).apply_async()
            assert len(result) == len(alchemy_enqueued.of(create)) == 2

        def test_eager_ones_run_as_well(alchemy_session, alchemy_enqueued):
            app.conf.task_always_eager = True
            try:
                create.delay("eager").get()
            finally:
                app.conf.task_always_eager = False
            alchemy_enqueued.assert_enqueued(create)
            assert alchemy_session.query(User).count() == 1

        def test_what_a_failure_says(alchemy_enqueued):
            create.delay("ada")
            with pytest.raises(AssertionError, match="create args=.*'bob'.* was to be sent at least once, and"):
                alchemy_enqueued.assert_enqueued(create, args=("bob",))
            with pytest.raises(AssertionError, match="Sent so far:\\n  shop.create args=.*'ada'"):
                alchemy_enqueued.assert_enqueued(create, args=("bob",))
            with pytest.raises(AssertionError, match="was to be sent 2 times, and was sent 1 time[.]") as caught:
                alchemy_enqueued.assert_enqueued(create, count=2)
            hidden = [entry.ishidden(caught) for entry in caught.traceback]
            assert hidden == [False, True]  # the line of the test is shown
            with pytest.raises(AssertionError, match="was not to be sent"):
                alchemy_enqueued.assert_not_enqueued(create)
        """
    assert "5 passed" in run(code)


def test_asyncio(run: Run, url: str) -> None:
    code = """
        import asyncio
        import pytest
        from shop import User, create, db

        @pytest.mark.asyncio
        async def test_async(alchemy_session):
            await asyncio.sleep(0)
            create.apply(("ada",)).get()
            await asyncio.to_thread(lambda: create.apply(("grace",)).get())
            db.session.add(User(name="web"))
            db.session.commit()
            await asyncio.sleep(0)
            assert alchemy_session.query(User).count() == 3
        """
    assert "1 passed" in run(code)
    assert rows(url) == 0


def test_without_a_fixture_nothing_is_imported(run: Run, shop: Path) -> None:
    (shop / "conftest.py").unlink()
    code = """
        import sys

        def test_nothing():
            assert "celery_alchemy.workers.pytest_plugin" in sys.modules
            assert not {"celery", "sqlalchemy", "celery_alchemy.strategies"} & set(sys.modules)
        """
    assert "1 passed" in run(code, "-p", "no:celery")


def test_the_alchemy_is_found_or_asked_for(run: Run, shop: Path) -> None:
    (shop / "conftest.py").unlink()
    asking = """
        import shop
        def test_found(alchemy):
            assert alchemy is shop.db
        """
    assert "1 passed" in run(asking)
    two = (
        asking
        + "\n        from celery import Celery\n        other = shop.Alchemy(Celery('other', set_as_current=False))\n"
    )
    assert "2 Alchemy objects were found. Name yours in conftest.py: a fixture `alchemy`" in run(two, fails=True)
