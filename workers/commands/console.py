"""`celery-alchemy ...`: commands that read the source files of a project, without its app and its servers."""

from __future__ import annotations

from pathlib import Path

import click

from .installing import install


@click.group()
def main() -> None:
    """Read a project's source files; for commands that need its app, see `celery alchemy`."""


@main.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("-P", "--pool", help="The worker pool of your workers; without it, as the project's files say.")
@click.option("--strict", is_flag=True, help="Exit code 1 for warnings too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def doctor(ctx: click.Context, path: Path, pool: str | None, strict: bool, as_json: bool) -> None:
    """Look in source files for what goes wrong in production.

    Nothing is imported, and no server is asked; `celery alchemy doctor` looks at settings and servers too. Exit code 1
    for errors.
    """
    from ..doctor import report
    from ..doctor.reading.project import POOLS
    from ..doctor.static import examine_path

    if pool is not None and pool not in POOLS:
        raise click.UsageError(f"--pool={pool!r} is none of {', '.join(POOLS)}.")
    reading = examine_path(path, pool=pool)
    if not reading.files and not reading.of("note"):
        raise click.UsageError(f"There is no Python file in {path}.")
    click.echo(report.reading_as_json(reading) if as_json else "\n".join(report.reading_lines(reading)))
    if reading.of("error") or (strict and reading.of("warning")):
        ctx.exit(1)


@main.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--diff", is_flag=True, help="Print what would change, and write nothing.")
@click.pass_context
def adopt(ctx: click.Context, path: Path, diff: bool) -> None:
    """Rewrite tasks that manage a Session by hand.

    A task is rewritten when every use of its Session is understood. Any other stays as it is, and a line says why. Exit
    code 1 when there is such a task, or a file that cannot be read.
    """
    try:
        import libcst  # noqa: F401
    except ModuleNotFoundError as error:
        raise click.UsageError(f"adopt needs libcst: {install('adopt')}.") from error
    from ..adopting import adopt as run

    outcome = run(path, write=not diff)
    for line in outcome.lines(diff=diff):
        click.echo(line)
    ctx.exit(1 if outcome.refused or outcome.unread else 0)
