"""A run of the benchmark: its services, its load generator, what is kept and what is said meanwhile."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status

from ..client.lines import leave_on_signals
from ..errors import LoadTestError
from ..services.harness import services
from ..tasks.patterns import OURS, PATTERNS
from ..tasks.workloads import WORKLOADS
from .batches import Tell
from .cells import Bench, Generator
from .contests import Contest, UserTask
from .results import RUN_FILE, RunFacts
from .store import Store, forget, machine, versions, writing

WIDTH = 130  # Columns, where the output is no terminal that knows its own width


@dataclass(frozen=True, slots=True)
class Run:
    """A command that runs: what all of it shares, where it keeps what it finds, and where it says what it does."""

    bench: Bench
    store: Store
    console: Console
    status: Status

    def tell(self, job: str) -> Tell:
        """Return what shows the stage that a job is at, where the output is a terminal."""
        return lambda stage: self.status.update(f"{job}: {stage}")


@contextmanager
def running(
    part: str, contests: Sequence[Contest], options: dict[str, Any], user_task: UserTask | None, /, *, out: Path,
    fresh: bool, database_url: str | None, broker_url: str | None, **given: Any,
) -> Iterator[Run]:  # fmt: skip
    """Start the services and the load generator; leave by a signal as by Ctrl-C, and say what is kept.

    Writes the report when the block ends well, and exits with 1 if an arm of our own is broken.

    Args:
        part: Of a results directory: `matrix`, `sweep` or `demo`.
        options: What results depend on, besides those in `given`.
    """
    console, options = console_of_run(), {**options, **given}
    leave_on_signals()
    try:
        with ExitStack() as stack:
            stack.enter_context(writing(out))
            if part == "demo" and (out / RUN_FILE).exists() and set(RunFacts.read(out).options) != {"demo"}:
                raise LoadTestError(f"--out {out} holds other results than a demo's. Give another directory.")
            if user_task:
                database_url = user_task.database_url and user_task.database_url.render_as_string(hide_password=False)
                broker_url = user_task.broker_url
            found = stack.enter_context(services(database_url, broker_url, own_server=not user_task))
            generator = stack.enter_context(Generator.running(found.run))
            labels = [*([found.server.label] if found.server else []), found.broker.label]
            console.print(", ".join(labels), highlight=False)
            if fresh:
                forget(out)
            store = Store(out, part, _facts(labels, contests, options))
            with console.status("") as status:
                yield Run(Bench(found.run, found.server, found.broker, generator, user_task), store, console, status)
    except LoadTestError as error:
        console.print("[bold red]The benchmark cannot go on.[/]", end=" ")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except SystemExit as leaving:
        if leaving.code == 128 + signal.SIGINT:
            console.print(
                f"Stopped: the workers and servers of this run are gone. What was finished is in {out}; the same "
                f"command goes on from there."
            )
        raise
    write_report(console, out)
    sys.exit(any(OURS in name for names in store.broken.values() for name in names))


def _facts(services: list[str], contests: Sequence[Contest], options: dict[str, Any]) -> RunFacts:
    names = dict.fromkeys(contest.workload for contest in contests)
    patterns = dict.fromkeys(arm.pattern for contest in contests for arm in contest.arms)
    asked, own = "The task that was asked for.", "The task's own way to get a Session."
    return RunFacts(
        command=command_line(),
        begun=datetime.now(UTC).isoformat(timespec="seconds"),
        options=options,
        services=services,
        versions=versions(),
        machine=machine(),
        workloads={name: WORKLOADS[name].summary if name in WORKLOADS else asked for name in names},
        patterns={name: PATTERNS[name].summary if name in PATTERNS else own for name in patterns},
        objective=options.get("objective", ""),
    )


def command_line() -> str:
    """Return the command as it was given, without what a URL would tell."""
    words, hidden = [], False
    for word in sys.argv[1:]:
        name, equals, _ = word.partition("=")
        secret = name in ("--database-url", "--broker-url")
        words.append("..." if hidden else f"{name}=..." if secret and equals else word)
        hidden = secret and not equals
    return shlex.join(["celery", *words])


def write_report(console: Console, directory: Path) -> None:
    """Print the summary of a results directory, and write its report."""
    from .. import reports

    for path in reports.write_report(console, directory):
        console.print(f"Written: {path}", highlight=False)


def console_of_run() -> Console:
    """Return where a run says what it does."""
    return Console(width=None if sys.stdout.isatty() or os.environ.get("COLUMNS") else WIDTH)
