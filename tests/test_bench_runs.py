"""The benchmark as a whole: real workers, an embedded PostgreSQL and Valkey; interrupted, killed, gone on with."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import psutil
import pytest
from sqlalchemy import URL
from support import servers
from support.waiting import eventually

from celery_alchemy.loadtests.bench.batches import CHECKED_SLICE
from celery_alchemy.loadtests.bench.results import Batch, NoRunError, RunFacts, SweepStep, read_batches, read_sweep
from celery_alchemy.loadtests.bench.rows import TaskRow, read_rows

pytestmark = pytest.mark.timeout(240)
CELERY = [sys.executable, "-m", "celery"]


@pytest.fixture
def place() -> Iterator[Path]:
    """A short directory to run in: every process of a run works in it, or was told its path."""
    with tempfile.TemporaryDirectory(prefix="ca-", dir="/tmp") as name:
        # As root, the servers of a run work under another account.
        Path(name).chmod(0o711)
        yield Path(name)


def command(place: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    environ = {name: value for name, value in os.environ.items() if name not in {"DATABASE_URL", "BROKER_URL"}}
    return [*CELERY, *arguments], {**environ, "TMPDIR": str(place), "PYTHONPATH": str(place)}


def run(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    words, environ = command(place, *arguments)
    return subprocess.run(words, cwd=place, env=environ, capture_output=True, text=True, timeout=200, check=False)


def processes_of(place: Path) -> list[str]:
    """Return what still runs of a run: workers work in its directory, servers were told a path below it."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd", "status"]):
        if process.info["status"] == psutil.STATUS_ZOMBIE:
            continue
        words = " ".join(process.info["cmdline"] or ())
        if str(place) in words or str(place) in (process.info["cwd"] or ""):
            found.append(words[:120])
    return found


def nothing_left(place: Path) -> None:
    eventually(lambda: not processes_of(place), "everything of the run ended", within_s=60)
    eventually(lambda: not list(place.glob("celery-alchemy-*")), "its directory is gone", within_s=60)


def only_batch(directory: Path) -> Batch:
    (batch,) = read_batches(directory)
    return batch


def breaches(batch: Batch) -> dict[str, set[str]]:
    return {cell.arm.pattern: {verdict.name for verdict in cell.broken} for cell in batch.cells}


def test_broken_patterns_are_caught_and_get_no_speed(place: Path) -> None:
    """Under threads the recipe's Session and the global one are shared: several checks see it, and no slices."""
    done = run(
        place, "alchemy", "bench", "--pools=threads", "--workloads=transfer", "--contests=patterns",
        "--strategies=auto", "--baselines=recipe,global_session,with_session", "--rounds=2", "--restarts=1",
        "--slice=300ms", "--out=out",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    batch = only_batch(place / "out")
    found = breaches(batch)
    assert found["celery-alchemy"] == found["with_session"] == set()
    for pattern in ("recipe", "global_session"):
        assert "every task had a Session of its own" in found[pattern]
        assert len(found[pattern]) > 1
    assert {one.arm.rpartition("-4-")[2] for one in batch.slices} == {
        "celery-alchemy-auto",
        "celery-alchemy-auto-copy",
        "with_session",
    }
    ours = [one for one in batch.slices if one.arm == batch.reference]
    assert len(ours) == 2
    assert all(one.succeeded and one.worker_cpu_s > 0 and one.database_cpu_s is not None for one in ours)
    assert len(list((place / "out" / "tasks").glob("*.csv.gz"))) == 1
    nothing_left(place)


def test_the_recipe_leaks_its_session_when_a_task_is_retried_under_prefork(place: Path) -> None:
    done = run(
        place, "alchemy", "bench", "check", "--pools=prefork", "--workloads=mix", "--strategies=auto",
        "--baselines=recipe", "--concurrency=1", "--out=out",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    batch = only_batch(place / "out")
    assert breaches(batch)["celery-alchemy"] == set()
    assert breaches(batch)["recipe"]
    assert batch.slices == []
    assert {cell.strategy for cell in batch.cells if cell.arm.pattern == "celery-alchemy"} == {"per_process"}


def test_a_driver_that_blocks_the_hub_is_refused(place: Path) -> None:
    """psycopg 3 under eventlet: our strategies mend it, a hand-written pattern has it."""
    done = run(
        place, "alchemy", "bench", "check", "--pools=eventlet", "--workloads=select", "--strategies=auto",
        "--baselines=with_session", "--out=out",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = breaches(only_batch(place / "out"))
    assert found == {"celery-alchemy": set(), "with_session": {"the driver does not block the green hub"}}


def kept_so_far(directory: Path) -> list[Batch]:
    try:
        return list(read_batches(directory))
    except NoRunError:
        return []


@pytest.mark.timeout(400)  # two whole runs
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing_behind_and_goes_on(place: Path, number: signal.Signals) -> None:
    arguments = (
        "alchemy", "bench", "--pools=solo,threads", "--workloads=insert", "--contests=patterns", "--strategies=auto",
        "--baselines=none", "--rounds=2", "--restarts=2", "--slice=300ms", "--out=out",
    )  # fmt: skip
    words, environ = command(place, *arguments)
    with subprocess.Popen(words, cwd=place, env=environ, stdout=subprocess.PIPE, text=True) as process:
        eventually(lambda: kept_so_far(place / "out"), "a batch is kept", within_s=200)
        time.sleep(1)
        process.send_signal(number)
        output, _ = process.communicate(timeout=250)
    assert process.returncode == 128 + number, output
    nothing_left(place)
    kept = list(read_batches(place / "out"))
    assert 1 <= len(kept) < 4

    done = run(place, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(kept)} of 4 batches are there" in done.stdout
    batches_now = list(read_batches(place / "out"))
    assert batches_now[: len(kept)] == kept
    assert {(batch.contest, batch.number) for batch in batches_now} == {
        (f"patterns/{pool}/insert", number) for pool in ("solo", "threads") for number in (1, 2)
    }
    numbers = [one.number for batch in batches_now for one in batch.slices]
    assert len(set(numbers)) == len(numbers) == 8


def test_a_killed_run_leaves_nothing_behind(place: Path) -> None:
    words, environ = command(
        place, "alchemy", "bench", "--pools=prefork", "--workloads=slow_io", "--contests=patterns", "--strategies=auto",
        "--baselines=none", "--rounds=3", "--restarts=1", "--out=out",
    )  # fmt: skip
    with subprocess.Popen(words, cwd=place, env=environ, stdout=subprocess.DEVNULL) as process:
        try:
            # Main process and four pool processes each, load generator, PostgreSQL, Valkey, guard.
            eventually(lambda: len(processes_of(place)) > 15, "both workers run", within_s=100)
        finally:
            process.kill()
    nothing_left(place)


def test_a_sweep_finds_the_rate_that_keeps_the_objective(place: Path) -> None:
    """slow_query takes 50 ms, so one slot answers 20 a second: 5 must do, 60 cannot."""
    done = run(
        place, "alchemy", "bench", "sweep", "--pools=solo", "--workloads=slow_query", "--rates=5,60,80",
        "--objective=p95=1s", "--step=3s", "--sweeps=2", "--tasks=10", "--out=out",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    every = sorted(read_sweep(place / "out"), key=lambda step: step.sweep)
    assert [(step.sweep, step.offered_per_s) for step in every] == [
        (number, rate) for number in (1, 2) for rate in (5, 60, 80)
    ]
    steps = every[:3]
    assert [step.met for step in steps] == [True, False, False]
    assert steps[1].achieved_per_s < 30
    assert steps[1].latency is not None
    assert steps[0].latency is not None
    # A queue that grows is seen, because latency counts from when a task should have been sent.
    assert steps[1].latency.p95 > 5 * steps[0].latency.p95
    # Of those that were sent each is late that took longer than the objective; the generator itself was in time.
    assert steps[0].late == 0 < steps[1].late
    assert {step.skipped for step in steps} == {0}
    assert steps[1].uncorrected is not None
    assert steps[-1].verdicts
    assert all(verdict.passed for verdict in steps[-1].verdicts)
    assert RunFacts.read(place / "out").objective == "p95=1000ms"
    # The histogram is of the tasks at the knee, and of no others.
    kept = [row for step in every if step.offered_per_s == 5 for row in rows_of(place / "out", step)]
    assert kept
    assert len({(step.sweep, step.slice) for step in every}) == len(every)
    (histogram,) = (place / "out").glob("slow_query-solo-*.corrected.hgrm")
    assert f"Total count    = {len(kept):12d}]" in histogram.read_text()


def rows_of(directory: Path, step: SweepStep) -> list[TaskRow]:
    path = directory / "tasks" / f"sweep-{step.workload}-{step.arm.name}-{step.sweep}.csv.gz"
    return [row for row in read_rows(path) if row.slice == step.slice != CHECKED_SLICE and row.succeeded]


@pytest.fixture
def redis_broker() -> Iterator[str]:
    with servers.redis_server() as urls:
        yield urls.celery


@pytest.fixture
def project(place: Path, postgresql_server: URL) -> Path:
    """A user's own project, with its own database and broker."""
    url = postgresql_server.render_as_string(hide_password=False)
    (place / "shop.py").write_text(
        dedent(f"""
            from celery import Celery
            from sqlalchemy import text
            from celery_alchemy import Alchemy, DatabaseTask

            app = Celery("shop", broker="redis://nowhere.invalid/")
            app.conf.alchemy_database_url = {url!r}
            db = Alchemy(app)

            @app.task(base=DatabaseTask, bind=True)
            def count(self, number, *, fail=False):
                assert self.db.execute(text("SELECT 40 + :number"), {{"number": number}}).scalar_one() == 42
                if fail:
                    raise LookupError(number)
        """)
    )
    return place


def test_a_task_of_the_users_own(project: Path, redis_broker: str) -> None:
    done = run(
        project, "-A", "shop", "alchemy", "bench", "--task=shop.count", "--args=[2]", "--pools=threads,solo",
        "--strategies=local", "--rounds=2", "--restarts=1", "--slice=300ms", f"--broker-url={redis_broker}",
        "--out=out",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    batches = {batch.contest: batch for batch in read_batches(project / "out")}
    assert set(batches) == {"patterns/threads/shop.count", "patterns/solo/shop.count", "pools/shop.count"}
    threads = batches["patterns/threads/shop.count"]
    assert [cell.strategy for cell in threads.cells] == ["scoped", "scoped", "local"]
    assert not any(cell.broken for batch in batches.values() for cell in batch.cells)
    assert all(one.succeeded for batch in batches.values() for one in batch.slices)
    # Each arm's own, though all are in one database at the same time: not more than it promised.
    for batch in batches.values():
        for cell in batch.cells:
            assert cell.promised_connections is not None
            assert 1 <= cell.peak_connections <= cell.promised_connections
            (kept,) = (one for one in cell.verdicts if one.name == "never more connections than promised")
            assert not kept.detail
    assert redis_broker not in (project / "out" / "run.sqlite").read_bytes().decode(errors="replace")
    nothing_left(project)


def test_a_task_of_the_users_own_that_fails_is_broken(project: Path, redis_broker: str) -> None:
    done = run(
        project, "-A", "shop", "alchemy", "bench", "check", "--task=shop.count", "--args=[2]",
        '--kwargs={"fail": true}', "--pools=solo", f"--broker-url={redis_broker}", "--out=out",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert breaches(only_batch(project / "out"))["celery-alchemy"] == {"every task ended as it was meant to"}


def test_an_unknown_task_is_refused_with_the_nearest_name(project: Path) -> None:
    done = run(project, "-A", "shop", "alchemy", "bench", "--task=shop.cuont")
    assert done.returncode == 2
    assert "shop has no task 'shop.cuont'. Did you mean 'shop.count'?" in " ".join(done.stderr.split())
    assert processes_of(project) == []


def test_a_database_that_does_not_answer_is_said_so(place: Path) -> None:
    url = "postgresql://somebody:secret@127.0.0.1:1/shop"
    done = run(place, "alchemy", "bench", "check", f"--database-url={url}")
    assert done.returncode == 2
    assert "cannot connect to postgresql+psycopg://somebody:***@127.0.0.1:1/shop" in " ".join(done.stdout.split())
    assert "secret" not in done.stdout + done.stderr
    assert processes_of(place) == []


def test_a_demo_counts_the_orders_of_the_recipe_and_of_ours(place: Path) -> None:
    """Of both the same number was sent; what is right, wrong or without an answer adds up to it."""
    done = run(place, "alchemy", "bench", "demo", "--pools=threads,solo", "--out=out")
    assert done.returncode == 0, done.stdout + done.stderr
    batches = {batch.contest: batch for batch in read_batches(place / "out")}
    assert set(batches) == {"demo/threads", "demo/solo"}
    for batch in batches.values():
        counted = {cell.arm.pattern: cell.counted for cell in batch.cells}
        recipe, ours = counted["recipe"], counted["celery-alchemy"]
        assert recipe is not None
        assert ours is not None
        assert recipe.sent == ours.sent == ours.right > 0
        assert (ours.wrong, ours.unanswered, ours.connections_left) == (0, 0, 0)
        assert recipe.right + recipe.wrong + recipe.unanswered == recipe.sent
        assert recipe.wrong + recipe.unanswered > 0
        assert min(ours.seconds, ours.worker_cpu_s, recipe.seconds, recipe.worker_cpu_s) > 0
    nothing_left(place)


def test_a_demo_in_the_background_can_be_stopped(place: Path) -> None:
    """A shell starts what runs in the background with SIGINT ignored; whoever stops it all the same means it."""
    words, environ = command(place, "alchemy", "bench", "demo", "--pools=solo", "--out=out")
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    shell = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *words]
    with subprocess.Popen(shell, cwd=place, env=environ, start_new_session=True, text=True, **quiet) as process:
        eventually(lambda: len(processes_of(place)) > 6, "the workers run", within_s=100)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=250)
    assert process.returncode == 128 + signal.SIGINT, output
    nothing_left(place)


def test_a_demo_removes_no_results_but_those_of_a_demo(place: Path) -> None:
    (place / "out").mkdir()
    RunFacts("celery alchemy bench", "", {"matrix": {"rounds": 40}}, [], {}, {}, {}, {}).write(place / "out")
    done = run(place, "alchemy", "bench", "demo", "--out=out")
    assert done.returncode == 2
    assert "--out out holds other results than a demo's" in done.stdout
    assert RunFacts.read(place / "out").options == {"matrix": {"rounds": 40}}
