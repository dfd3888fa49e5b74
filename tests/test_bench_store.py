"""What a run keeps is whole after an interruption, goes on where it stopped, and never mixes with another run."""

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from celery_alchemy.loadtests.bench.contests import patterns_contest, remaining
from celery_alchemy.loadtests.bench.results import (
    RUN_FILE,
    Arm,
    Batch,
    Cell,
    Counted,
    NoRunError,
    RunFacts,
    Slice,
    SweepStep,
    Verdict,
    insert,
    opened,
    read_batches,
    read_sweep,
)
from celery_alchemy.loadtests.bench.rows import Percentiles, TaskRow, read_rows
from celery_alchemy.loadtests.bench.store import OtherRunError, Store, forget, writing

ARM = Arm("threads", 4, "celery-alchemy", "auto")
CONTEST = patterns_contest("select", ARM, [], ["recipe"])
RECIPE = CONTEST.arms[-1]
ROW = TaskRow(
    3, ARM.name, "select", 7, 'id,with\n"marks"', 1.0, 1.0, 1.5, 2.25, "success", 1, 0.125, 0.5, error="é, \n"
)
FACTS = RunFacts(
    command="celery alchemy bench", begun="2026-01-01", options={"rounds": 2}, services=["PostgreSQL 18"],
    versions={"celery": "5.7.0"}, machine={"cpus": "2"}, workloads={"select": "Reads."}, patterns={},
)  # fmt: skip


def batch(number: int, *, broken: bool = False) -> Batch:
    verdicts = [Verdict("every task was answered", True), Verdict("the worker started", not broken, "no" * broken)]
    cells = [
        Cell(ARM, verdicts[:1], phases={"run": Percentiles(1, 1.0, 2.0, 3.0, 4.0)}, log="[2026-01-01] it's {not} JSON"),
        Cell(RECIPE, verdicts, errors={"KeyError": 3}, counted=Counted(20, 2, 17, 1, 4, 1.5, 0.25)),
    ]
    item = Slice(
        number=10 * number, round=1, position=0, arm=ARM.name, seconds=1.0, succeeded=9, failed=0,
        unanswered=0, tasks=10, latency=Percentiles(9, 1.0, 2.0, 3.0, 4.0), worker_cpu_s=0.1, database_cpu_s=None,
        generator_cpu_s=0.1, foreign_cpus=0.0, wall_s=1.2,
    )  # fmt: skip
    return Batch(CONTEST.name, number, "select", ARM.name, cells, [item, replace(item, latency=None)])


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    store = Store(tmp_path, "matrix", FACTS)
    assert not store.resumed
    store.add_batch(batch(1), [ROW])
    step = SweepStep(ARM, "select", 10.0, 4.0, 9.5, 0, 0, None, 0.0, 3, 0.1, True, sweep=2, late=3, skipped=4)
    steps = [step, replace(step, verdicts=[Verdict("x", True)], latency=Percentiles(9, 1.0, 2.0, 3.0, 4.0, 3.5))]
    store.add_sweep(steps, [ROW, ROW])
    store.add_round_trips({"select": {"recipe": 3.0}})

    assert list(read_batches(tmp_path)) == [batch(1)]
    assert list(read_sweep(tmp_path)) == steps
    assert RunFacts.read(tmp_path).round_trips == {"select": {"recipe": 3.0}}
    assert store.swept == Store(tmp_path, "matrix", FACTS).swept == {("select", ARM.name, 2)}
    packed = sorted((tmp_path / "tasks").iterdir())
    assert [path.name for path in packed] == ["patterns-threads-select-1.csv.gz", f"sweep-select-{ARM.name}-2.csv.gz"]
    assert list(read_rows(packed[0])) == [ROW]
    assert ROW.latency_ms == 1250
    assert (ROW.queue_ms, ROW.run_ms) == (500, 750)


def test_an_interrupted_run_goes_on_after_the_last_whole_batch(tmp_path: Path) -> None:
    Store(tmp_path, "matrix", FACTS).add_batch(batch(1, broken=True), [])
    with pytest.raises(RuntimeError), opened(tmp_path, write=True) as connection:
        # Killed in the middle of the next batch: what it wrote is in no file.
        insert(connection, "batches", batch(2))
        raise RuntimeError

    store = Store(tmp_path, "matrix", FACTS)
    assert store.resumed
    assert remaining(store, [CONTEST], restarts=3) == [(CONTEST, 2), (CONTEST, 3)]
    assert store.broken[CONTEST.name] == {RECIPE.name}
    assert store.next_slice == 11
    store.add_batch(batch(2), [])
    assert [one.number for one in read_batches(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (replace(FACTS, options={"rounds": 3}), "the options of matrix differ .rounds: 2 there, 3 now."),
        (replace(FACTS, versions={"celery": "5.8"}), "the versions differ .celery: '5.7.0' there, '5.8' now."),
        (replace(FACTS, machine={"cpus": "4"}), "the machine differ"),
        (replace(FACTS, services=["MariaDB"]), "the services differ"),
    ],
)
def test_results_that_cannot_be_compared_are_not_mixed(tmp_path: Path, facts: RunFacts, words: str) -> None:
    Store(tmp_path, "matrix", FACTS).add_batch(batch(1), [])
    with pytest.raises(OtherRunError, match=words):
        Store(tmp_path, "matrix", facts)
    forget(tmp_path)
    assert not Store(tmp_path, "matrix", facts).resumed


def test_a_sweep_is_added_to_a_matrix(tmp_path: Path) -> None:
    Store(tmp_path, "matrix", FACTS)
    facts = replace(FACTS, command="celery alchemy bench sweep", options={"rates": (1, 2)}, objective="p95=50ms")
    store = Store(tmp_path, "sweep", facts)
    assert store.facts.options == {"matrix": {"rounds": 2}, "sweep": {"rates": [1, 2]}}
    assert store.facts.command.splitlines() == ["celery alchemy bench", "celery alchemy bench sweep"]
    assert RunFacts.read(tmp_path) == store.facts
    assert Store(tmp_path, "sweep", facts).facts == store.facts


def test_where_there_is_no_run_that_is_said(tmp_path: Path) -> None:
    for read in (RunFacts.read, lambda directory: list(read_batches(directory))):
        with pytest.raises(NoRunError, match=f"holds no run of the benchmark: there is no {RUN_FILE} in it"):
            read(tmp_path)
    assert not list(tmp_path.iterdir()), "reading makes no file"


def test_a_file_whose_tables_are_not_made_yet_holds_no_run(tmp_path: Path) -> None:
    (tmp_path / RUN_FILE).touch()
    for read in (RunFacts.read, lambda directory: list(read_batches(directory))):
        with pytest.raises(NoRunError):
            read(tmp_path)
    Store(tmp_path, "matrix", FACTS).add_batch(batch(1), [])
    assert len(list(read_batches(tmp_path))) == 1


def test_a_file_of_an_older_version_is_read_with_what_it_has(tmp_path: Path) -> None:
    Store(tmp_path, "matrix", FACTS).add_batch(batch(1), [])
    with sqlite3.connect(tmp_path / RUN_FILE) as connection:
        connection.execute("ALTER TABLE cells DROP COLUMN counted")
    connection.close()
    assert [cell.counted for one in read_batches(tmp_path) for cell in one.cells] == [None, None]


def test_two_runs_do_not_write_into_one_directory(tmp_path: Path) -> None:
    first, second = writing(tmp_path / "out"), writing(tmp_path / "out")
    with first, pytest.raises(OtherRunError, match="Another run is writing into --out"), second:
        pytest.fail("both are writing")
    with writing(tmp_path / "out"):
        pass
