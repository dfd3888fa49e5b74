"""The core of the contract once more: other drivers, another database, another broker."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import kombu
import pytest
from support import servers
from support.databases import Database, PostgreSQL, assert_no_connections, new_mariadb
from support.worker import Site, Worker, running

# Collected again here, with the `worker` and the `database` below.
from test_contract_callbacks import (  # noqa: F401
    test_a_callback_runs_after_the_commit,
    test_a_failing_task_drops_its_callbacks,
)
from test_contract_endings import (  # noqa: F401
    test_a_base_exception_rolls_back,
    test_a_retry_is_published_after_rollback_and_release,
    test_a_swallowed_flush_error_fails_the_task,
    test_an_error_inside_a_savepoint_breaks_nothing,
    test_autoretry_for_does_the_same,
    test_ignore_and_reject_roll_back,
    test_raising_rolls_back,
    test_replace_commits_before_the_replacement_is_published,
    test_returning_commits,
    test_rolling_back_in_the_except_block_makes_the_session_usable,
    test_the_commit_comes_before_links_are_sent,
    test_the_commit_comes_before_the_next_task_of_a_chain_is_sent,
    test_the_recipe_works_unchanged,
    test_twenty_retries_leak_no_connection,
    test_without_commit_on_success_work_is_rolled_back_with_a_warning,
)
from test_contract_hooks import test_hooks_of_a_failure_are_committed_and_its_body_is_not  # noqa: F401
from test_contract_nesting import (  # noqa: F401
    test_a_task_called_like_a_function_joins,
    test_a_unit_of_work_inside_a_task_is_its_own,
    test_apply_inside_a_task_has_its_own_session,
)
from test_contract_sessions import (  # noqa: F401
    test_concurrent_increments_are_all_counted,
    test_db_session_is_the_tasks_session_down_the_call_stack,
    test_what_a_task_starts_has_no_session,
)


class Setup(NamedTuple):
    """A driver and a broker under a worker pool; the strategy is chosen by auto."""

    driver: str
    broker: str
    pool: str

    def __str__(self) -> str:
        return "-".join(self)


SETUPS = [
    *(Setup("psycopg2", "redis", pool) for pool in ("prefork", "threads", "gevent", "eventlet")),
    *(Setup("pymysql", "redis", pool) for pool in ("prefork", "threads", "gevent", "eventlet")),
    *(Setup("psycopg", "rabbitmq", pool) for pool in ("prefork", "threads", "gevent")),
]


@pytest.fixture(scope="module", params=SETUPS, ids=str)
def setup(request: pytest.FixtureRequest, site: Site) -> Iterator[tuple[Worker, Database]]:
    """A worker of this setup, and the database it uses."""
    setup: Setup = request.param
    name = f"{site.prefix[:-1]}-{setup}"
    broker_url = servers.rabbitmq() if setup.broker == "rabbitmq" else ""
    with ExitStack() as stack:
        database: Database
        if setup.driver == "pymysql":
            database = stack.enter_context(new_mariadb(servers.mariadb(), name.replace("-", "_")))
            url = database.url(name)
        else:
            database = request.getfixturevalue("run_database")
            assert isinstance(database, PostgreSQL)
            url = database.url(name, setup.driver)
        stack.callback(assert_no_connections, database, name)
        worker = Worker(site, name, setup.pool, database_url=url, broker_url=broker_url)
        if broker_url:
            stack.callback(delete_queue, broker_url, worker.queue)
        yield stack.enter_context(running(worker)), database


@pytest.fixture(scope="module")
def worker(setup: tuple[Worker, Database]) -> Worker:
    return setup[0]


@pytest.fixture(scope="module")
def database(setup: tuple[Worker, Database]) -> Database:
    return setup[1]


def delete_queue(broker_url: str, queue: str) -> None:
    with kombu.Connection(broker_url) as connection, connection.channel() as channel:
        channel.queue_delete(queue)
        channel.exchange_delete(queue)
