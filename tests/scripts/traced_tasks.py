"""Tasks of the tests' project that are traced by OpenTelemetry's own instrumentation, and listened to.

TRACED says when SQLAlchemy is instrumented: at `import`, in `worker_init` or in `worker_process_init`; `engine`: at
import, with db.engine. Each process writes its spans to a file of its own in the folder SPANS.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from celery.signals import worker_init, worker_process_init
from opentelemetry import trace
from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from sqlalchemy import Engine, event, select, text
from sqlalchemy.orm import sessionmaker
from support.project.app import db, task
from support.project.models import Row

when = os.environ["TRACED"]
#: Version 0.66 of it would do nothing with SQLAlchemy 2.1.
OPTIONS = {"skip_dep_check": True}
heard: list[str] = []
prepared: list[tuple[str, int, int]] = []


class File(SpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        with Path(os.environ["SPANS"], str(os.getpid())).open("a") as file:
            file.writelines(f"{(span.attributes or {}).get('db.statement')!r}\n" for span in spans)
        return SpanExportResult.SUCCESS


provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(File()))
trace.set_tracer_provider(provider)


def instrument(**_: Any) -> None:
    SQLAlchemyInstrumentor().instrument(**OPTIONS)


if when == "import":
    instrument()
elif when == "engine":
    SQLAlchemyInstrumentor().instrument(engine=db.engine, **OPTIONS)
else:
    {"worker_init": worker_init, "worker_process_init": worker_process_init}[when].connect(instrument, weak=False)


@task()
def traced(self: Any, key: str, note: str) -> int:
    self.db.add(Row(key=key, note=note))
    self.db.flush()
    self.db.scalars(select(Row.note).where(Row.key == key)).all()
    return os.getpid()


@worker_process_init.connect
def listen_in_pool_process(**_: Any) -> None:
    db.on_engine(lambda engine: prepared.append(("pool process", os.getpid(), id(engine))))
    event.listen(Engine, "after_cursor_execute", lambda *_: heard.append("class"))


if when == "engine":
    # What code puts on `db.engine` at import.
    early = db.engine
    Early = sessionmaker(bind=early)

    @event.listens_for(early, "connect")
    @event.listens_for(early, "checkout")
    def on_pool(*_: Any) -> None:
        heard.append("pool")

    @event.listens_for(early.pool, "checkin")
    def on_checkin(*_: Any) -> None:
        heard.append("checkin")

    @event.listens_for(early, "before_cursor_execute", retval=True)
    def on_statement(
        conn: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
    ) -> tuple[str, Any]:
        heard.append("statement")
        return f"{statement} /* listened */", parameters

    @event.listens_for(early, "commit")
    def on_commit(connection: Any) -> None:
        heard.append("commit")

    @event.listens_for(early.dialect, "do_connect")
    def on_connect(*_: Any) -> None:
        heard.append("connecting")

    early.update_execution_options(early="kept")


@db.on_engine
def prepare(engine: Engine) -> None:
    prepared.append(("import", os.getpid(), id(engine)))


@task()
def listened(self: Any) -> dict[str, Any]:
    """Return what the listeners heard of this process, and the text that the server got."""
    heard.clear()
    db.engine.dispose()
    statement = self.db.scalar(text("SELECT query FROM pg_stat_activity WHERE pid = pg_backend_pid()"))
    self.db.commit()
    options = db.engine.get_execution_options()
    return {"heard": sorted(set(heard)), "statement": statement, "option": options.get("early")}


@task()
def used_early(self: Any) -> bool:
    with Early() as session:
        return session.scalar(text("SELECT 1")) == 1


@task()
def who_prepared(self: Any) -> list[tuple[str, bool, bool]]:
    """Return who prepared the Engine of this process, and whether that was in this process."""
    return [(who, pid == os.getpid(), engine == id(db.engine)) for who, pid, engine in prepared]
