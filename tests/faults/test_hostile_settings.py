"""Settings as nobody should write them: each works, or is refused before the first task by a message that names it."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import make_url, text
from sqlalchemy.exc import SQLAlchemyError
from support.faults import amount

from celery_alchemy import Alchemy, ConfigurationError, WorkerPool

SECRET = "s3cr3t-s3cr3t"
EXAMPLES = amount(300, 10_000)
SETTINGS = (
    "alchemy_database_url",
    "alchemy_engine_options",
    "alchemy_session_options",
    "alchemy_session_strategy",
    "alchemy_commit_on_success",
    "alchemy_enqueue_on_commit",
)
POOLS = ("prefork", "threads", "gevent", "eventlet", "solo", "unheard-of")
ENGINE_OPTIONS = (
    "pool_size", "max_overflow", "pool_timeout", "pool_recycle", "pool_pre_ping", "pool_use_lifo", "poolclass", "pool",
    "pool_reset_on_return", "isolation_level", "connect_args", "creator", "echo", "echo_pool", "execution_options",
    "future", "hide_parameters", "json_serializer", "logging_name", "module", "paramstyle", "plugins",
    "query_cache_size", "skip_autocommit_rollback", "use_insertmanyvalues", "url", "strategy", "_initialize",
)  # fmt: skip
SESSION_OPTIONS = (
    "autoflush", "autobegin", "expire_on_commit", "bind", "binds", "info", "query_cls", "twophase",
    "enable_baked_queries", "join_transaction_mode", "close_resets_only", "future", "autocommit", "class_",
)  # fmt: skip


class Stranger:
    """A value of a type that nobody expects."""

    def __repr__(self) -> str:
        return "a stranger"


plain = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.floats()
    | st.text(max_size=12)
    | st.binary(max_size=4)
    | st.sampled_from([Stranger(), Stranger, print, "AUTOCOMMIT", "SERIALIZABLE", "debug", "rollback", "auto", "local"])
)
anything = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=5,
)
urls = st.sampled_from(
    [
        "sqlite://",
        "sqlite:///:memory:",
        "postgresql://",
        "postgresql+psycopg://me@127.0.0.1:1/shop",
        "postgresql+asyncpg://me@127.0.0.1:1/shop",
        "mysql+pymysql://me@127.0.0.1:1/shop",
        "mysql+nosuch://127.0.0.1/shop",
        "nosuch://127.0.0.1/shop",
        "postgresql+psycopg://me:p@ss@w@rd@127.0.0.1:port/shop",
        "://",
        "postgresql",
        make_url("sqlite://"),
    ]
)
names = st.sampled_from


def dictionaries(known: tuple[str, ...]) -> st.SearchStrategy[Any]:
    return st.dictionaries(names(known) | st.text(max_size=8), anything, max_size=3)


configurations = st.fixed_dictionaries(
    {"alchemy_database_url": urls | st.just("sqlite://") | anything},
    optional={
        "alchemy_engine_options": dictionaries(ENGINE_OPTIONS) | anything,
        "alchemy_session_options": dictionaries(SESSION_OPTIONS) | anything,
        "alchemy_session_strategy": names(
            ["auto", "local", "scoped", "per_process", "scopd", "os:path", "a.b:C", "a:b:c"]
        )
        | st.dictionaries(names(POOLS), names(["local", "scoped", "nosuch"]), max_size=2)
        | anything,
        "alchemy_commit_on_success": anything,
        "alchemy_enqueue_on_commit": anything,
        "alchemy_databse_url": anything,
    },
)


class Sentences(logging.Handler):
    """What was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@pytest.fixture(scope="module")
def sentences() -> Iterator[list[str]]:
    handler, logger = Sentences(), logging.getLogger("celery_alchemy")
    logger.addHandler(handler)
    yield handler.said
    logger.removeHandler(handler)


@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=True
)
@given(configuration=configurations, pool=names(["prefork", "threads", "solo", "unheard-of"]))
@pytest.mark.timeout(amount(120, 3600))
def test_any_settings(sentences: list[str], configuration: dict[str, Any], pool: str) -> None:
    sentences.clear()
    app = Celery("hostile", broker="memory://", set_as_current=False)
    app.conf.update(configuration)
    db = Alchemy(app)
    refusal = ""
    try:
        db.start_worker(WorkerPool(name=pool, concurrency=2))
        with db.unit_of_work() as session:
            session.execute(text("SELECT 1"))
    except ConfigurationError as error:
        refusal = str(error)
    except SQLAlchemyError:
        pass  # the database's own answer: no such server, an unknown parameter
    except Exception:
        # What no check at start can find, for it would have to connect.
        assert any("alchemy_engine_options" in sentence for sentence in sentences)
    finally:
        with contextlib.suppress(SQLAlchemyError):
            db.stop()
    assert not refusal or "alchemy_" in refusal
    assert "p@ss" not in refusal
