"""`celery alchemy ...`: the commands of celery-alchemy below Celery's own."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import click

from .installing import install

GROUP = "celery_alchemy.commands"
"""Entry points that name a click command each; `loadtests` adds its own here."""


class Commands(click.Group):
    """A group whose commands are imported when they are asked for: each may need packages of an extra."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        return sorted({*super().list_commands(ctx), *(point.name for point in entry_points(group=GROUP))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command; one whose packages are not installed says so when it is called."""
        found = super().get_command(ctx, cmd_name)
        for point in entry_points(group=GROUP, name=cmd_name) if found is None else ():
            try:
                loaded: Any = point.load()
            except ModuleNotFoundError as error:
                return _missing(cmd_name, str(error.name).partition(".")[0])
            assert isinstance(loaded, click.Command)
            return loaded
        return found


def _missing(name: str, package: str) -> click.Command:
    words = f"needs {package}: {install('loadtest')}."

    def refuse() -> None:
        raise click.UsageError(f"celery alchemy {name} {words}")

    anything: dict[str, Any] = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
    # The short help is not cut to the width of the terminal: what to install would be lost.
    said = f"Not installed: {words}"
    return click.Command(name, callback=refuse, help=said, short_help=said, context_settings=anything)


@click.group(cls=Commands)
def alchemy() -> None:
    """SQLAlchemy sessions for Celery tasks: benchmarks and checks."""


@alchemy.group()
def outbox() -> None:
    """Messages that wait in the database (alchemy_outbox)."""


@outbox.command()
@click.option("--once", is_flag=True, help="Send what waits now, and end.")
@click.option("--interval-s", default=1.0, show_default=True, help="Seconds between two looks at an empty outbox.")
@click.pass_context
def run(ctx: click.Context, once: bool, interval_s: float) -> None:
    """Send what waits in the outbox; several of these may run at one time.

    A row that somebody else is sending is left out. Killed anywhere, a row is sent again: a task may run twice.
    """
    from .outbox import run_outbox

    run_outbox(ctx.obj.app, once=once, interval_s=interval_s)


def _about_rows(command: Any) -> Any:
    """Give a command the options that choose rows of the outbox."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option("--set-aside", is_flag=True, help="Those that are set aside after too many failures."),
        click.option("--task", metavar="NAME", help="Those of the task with this name."),
        click.argument("task_ids", nargs=-1, metavar="[TASK_ID]..."),
    ):
        command = option(command)
    return command


@outbox.command("list")
@_about_rows
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="So many at most.")
@click.pass_context
def list_(
    ctx: click.Context, task_ids: tuple[str, ...], task: str | None, set_aside: bool, as_json: bool, limit: int
) -> None:
    """Show the messages that wait in the outbox, the oldest first."""
    from . import outbox_rows

    choice = outbox_rows.Choice(task_ids, task, set_aside)
    outbox_rows.show(ctx.obj.app, choice, limit=limit, to_json=as_json)


@outbox.command()
@_about_rows
@click.option("--all", "everything", is_flag=True, help="All of them.")
@click.pass_context
def retry(
    ctx: click.Context, task_ids: tuple[str, ...], task: str | None, set_aside: bool, as_json: bool, everything: bool
) -> None:
    """Let messages be sent at once, those that were set aside too.

    What a sender is sending now is left to it. Exit code 1 where there is none such.
    """
    from . import outbox_rows

    choice = outbox_rows.Choice(task_ids, task, set_aside)
    outbox_rows.retry(ctx.obj.app, choice, everything=everything, to_json=as_json)


@outbox.command()
@_about_rows
@click.option("--all", "everything", is_flag=True, help="All of them.")
@click.pass_context
def drop(
    ctx: click.Context, task_ids: tuple[str, ...], task: str | None, set_aside: bool, as_json: bool, everything: bool
) -> None:
    """Delete messages from the outbox, for ever.

    One that a sender is sending at this moment may arrive all the same. Exit code 1 where there is none such.
    """
    from . import outbox_rows

    choice = outbox_rows.Choice(task_ids, task, set_aside)
    outbox_rows.drop(ctx.obj.app, choice, everything=everything, to_json=as_json)


@alchemy.group()
def completed() -> None:
    """Tasks with exactly_once that are recorded as completed."""


@completed.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--task", metavar="NAME", help="Those of the task with this name.")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="So many at most.")
@click.argument("task_ids", nargs=-1, metavar="[TASK_ID]...")
@click.pass_context
def list_completed(ctx: click.Context, task_ids: tuple[str, ...], task: str | None, limit: int, as_json: bool) -> None:
    """Show the tasks that are recorded, the newest first."""
    from . import completed as rows

    rows.show(ctx.obj.app, task_ids, task, limit=limit, to_json=as_json)


@completed.command()
@click.option("--older-than", required=True, metavar="SPAN", help="7d (days), 12h, 90m (minutes) or seconds.")
@click.option("--force", is_flag=True, help="Also within the visibility timeout of the broker.")
@click.pass_context
def prune(ctx: click.Context, older_than: str, force: bool) -> None:
    """Delete what is recorded of tasks that completed long ago; delivered again, they would run again."""
    from . import completed as rows

    rows.prune(ctx.obj.app, older_than, force=force)


@alchemy.command("in-doubt")
@click.option(
    "--wait-s", default=10.0, show_default=True, help="Seconds between two looks: what is gone is not in doubt."
)
@click.option("--resolve", is_flag=True, help="Commit what the deciding database has committed, roll back the rest.")
@click.pass_context
def in_doubt(ctx: click.Context, wait_s: float, resolve: bool) -> None:
    """Transactions that a crash left prepared (alchemy_two_phase).

    They hold their locks until somebody ends them. Exit code 1 when some are left.
    """
    from .in_doubt import report

    report(ctx.obj.app, wait_s=wait_s, resolve=resolve)


@alchemy.command()
@click.option("-P", "--pool", help="The worker pool of your workers; without it, the setting worker_pool.")
@click.option("-c", "--concurrency", type=click.IntRange(min=1), help="Their concurrency.")
@click.option("--hosts", type=click.IntRange(min=1), default=1, show_default=True, help="Hosts that run workers.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Workers on each host.")
@click.option("--no-connect", is_flag=True, help="Leave the servers alone.")
@click.option("--strict", is_flag=True, help="Exit code 1 for warnings too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def doctor(
    ctx: click.Context,
    pool: str | None,
    concurrency: int | None,
    hosts: int,
    workers: int,
    no_connect: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """Look for what goes wrong in production: settings, servers, code.

    Exit code 1 for errors. Reads only; one connection to each server.
    """
    from ..doctor import report
    from ..doctor.examine import examine
    from ..doctor.fleet import Fleet
    from ..doctor.reading.project import POOLS

    if pool is not None and pool not in POOLS:
        raise click.UsageError(f"--pool={pool!r} is none of {', '.join(POOLS)}.")
    fleet = Fleet(hosts, workers)
    diagnosis = examine(ctx.obj.app, pool=pool, concurrency=concurrency, fleet=fleet, connect=not no_connect)
    click.echo(report.as_json(diagnosis) if as_json else "\n".join(report.lines(diagnosis)))
    if diagnosis.of("error") or (strict and diagnosis.of("warning")):
        ctx.exit(1)
