"""What a run says: rows, one rule for what to choose, terminal and Markdown; broken arms have no speed anywhere."""

import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from support.bench_results import AUTOMATIC, CHECKS, Plan, write_results

from celery_alchemy.loadtests.bench.results import RUN_FILE, Arm
from celery_alchemy.loadtests.bench.rows import TaskRow
from celery_alchemy.loadtests.bench.store import Store
from celery_alchemy.loadtests.reports import write_report
from celery_alchemy.loadtests.reports.recommendation import Choice, recommend
from celery_alchemy.loadtests.reports.summary import Summary, summarise
from celery_alchemy.loadtests.reports.terminal import print_summary
from celery_alchemy.loadtests.tasks.patterns import OURS

PLAN = Plan(
    pools=("prefork", "threads", "gevent", "solo"),
    workloads=("transfer", "slow_io"),
    baselines=("recipe", "with_session", "null_pool", "process_init"),
)
SMALL = replace(PLAN, pools=("threads",), workloads=("transfer",), concurrencies=(), sweep=False)
BREACH = f'[{{"name": "{CHECKS[0]}", "passed": false, "detail": "1: abc"}}]'


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_results(tmp_path_factory.mktemp("results"), PLAN)


@pytest.fixture(scope="module")
def summary(directory: Path) -> Summary:
    return summarise(directory)


@pytest.fixture(scope="module")
def markdown(directory: Path) -> str:
    return report(directory)


@pytest.fixture(scope="module")
def found(summary: Summary) -> list[Choice]:
    return recommend(summary)


def choice(found: list[Choice], subject: str) -> Choice:
    (one,) = [one for one in found if one.subject == subject]
    return one


def change(directory: Path, statement: str, *values: object) -> None:
    """Change what a run kept."""
    with closing(sqlite3.connect(directory / RUN_FILE)) as connection, connection:
        assert connection.execute(statement, values).rowcount


def terminal(directory: Path, width: int = 110) -> str:
    """Return what is printed, without the page and its charts."""
    return printed(summarise(directory), width)


def printed(summary: Summary, width: int = 110) -> str:
    out = StringIO()
    print_summary(Console(file=out, width=width), summary, recommend(summary))
    return out.getvalue()


def report(directory: Path) -> str:
    """Write everything, and return the Markdown."""
    write_report(Console(file=StringIO(), width=110), directory)
    return (directory / "summary.md").read_text()


# Rows


def test_an_arm_without_breach_has_all_its_numbers(summary: Summary) -> None:
    contest = summary.contest("patterns/prefork/transfer")
    assert contest
    assert (contest.kind, contest.pool, contest.workers, contest.rounds) == ("patterns", "prefork", 6, 24)
    row = contest.row("prefork-4-null_pool")
    assert row
    assert row.speed
    goodput, cpu, database = (row.ratios.get(name) for name in ("goodput", "cpu", "database_cpu"))
    assert goodput
    assert cpu
    assert database
    assert (goodput.verdict, cpu.verdict, database.verdict) == ("slower", "dearer", "dearer")
    assert goodput.estimate.middle == pytest.approx(0.62, rel=0.1)
    assert database.estimate.middle == pytest.approx(9, rel=0.15)
    assert (goodput.estimate.workers, goodput.estimate.rounds) == (6, 24)
    assert (row.most("peak_connections"), row.most("promised_connections")) == (4, 4)
    assert row.speed.phases.keys() == {"queue", "checkout", "database", "run"}
    assert row.speed.latency
    assert row.speed.latency.n == 18_000
    assert row.speed.latency.p999


def test_the_reference_is_first_and_its_copy_second_and_sets_the_floor(summary: Summary) -> None:
    for contest in summary.contests:
        assert contest.rows[0].reference
        assert contest.rows[0].speed
        assert contest.rows[0].ratios == {}
        assert contest.rows[1].arm == replace(contest.rows[0].arm, copy=1)
        assert contest.floors.keys() == {"goodput", "cpu", "database_cpu", "p50", "p95", "p99"}
        assert all(1 < floor < 1.5 for floor in contest.floors.values())
        copy = contest.rows[1].ratios.get("goodput")
        assert copy
        assert copy.verdict == "no difference shown", "an arm cannot be beyond the floor that it sets"


def test_a_broken_arm_has_breaches_and_no_speed_anywhere(summary: Summary) -> None:
    broken = [row for contest in summary.contests for row in contest.rows if row.broken]
    assert {(row.arm.pool, row.arm.pattern) for row in broken} == {("threads", "recipe"), ("gevent", "recipe")}
    for row in broken:
        assert row.speed is None
        assert row.ratios == {}
        assert all(breach.name in CHECKS and breach.detail for breach in row.breaches)
        assert sum(cell.errors["InvalidRequestError"] for cell in row.cells) == 45
    for standing in summary.standings:
        assert not standing.broken or not standing.ratios


def test_a_breach_in_the_last_batch_takes_all_speed_away(tmp_path: Path) -> None:
    """It was measured in all of them, and looked fast."""
    directory = write_results(tmp_path, replace(SMALL, broken={}))
    change(directory, "UPDATE cells SET verdicts = ? WHERE batch = 6 AND arm LIKE '%with_session%'", BREACH)
    summary = summarise(directory)
    contest = summary.contest("patterns/threads/transfer")
    assert contest
    row = contest.row("threads-4-with_session")
    assert row
    assert row.speed is None
    assert [breach.name for breach in row.breaches] == [CHECKS[0]]
    (standing,) = [one for one in summary.standings if one.arm.pattern == "with_session"]
    assert standing.ratios == {}
    assert re.search(r"with_session +broken( +-){6}", terminal(directory))


def test_nothing_is_claimed_where_the_reference_is_broken(tmp_path: Path) -> None:
    summary = summarise(write_results(tmp_path, replace(SMALL, broken={("threads", OURS): {CHECKS[1]: "9 times"}})))
    (contest,) = summary.contests
    assert contest.note == "The reference is broken, so there is nothing to divide by."
    assert all(row.ratios == {} for row in contest.rows)
    assert all(standing.ratios == {} for standing in summary.standings)
    (one,) = recommend(summary)
    assert (one.subject, one.choice) == ("under threads", "no evidence")
    assert one.against == f"the reference is broken: {CHECKS[1]}: no"
    assert "celery-alchemy kept every one in 0 of 3" in " ".join(terminal(tmp_path).split())


def test_noise_and_a_busy_generator_are_flagged(tmp_path: Path) -> None:
    quiet = replace(PLAN, pools=("prefork",), baselines=("with_session",), sweep=False, batches=1)
    summary = summarise(write_results(tmp_path / "a", replace(quiet, foreign_cpus=0.9, generator_share=0.85)))
    flags = {
        flag.partition(":")[0]
        for contest in summary.contests
        for row in contest.rows
        if row.speed
        for flag in row.speed.flags
    }
    assert flags == {"foreign CPU", "generator-bound"}
    assert "kept more than 0.3 CPUs busy" in summary.flags[0]
    contests = summarise(write_results(tmp_path / "b", quiet)).contests
    assert not any(row.speed and row.speed.flags for contest in contests for row in contest.rows)


def test_tasks_that_wait_for_a_connection_are_marked(tmp_path: Path) -> None:
    summary = summarise(write_results(tmp_path, replace(SMALL, broken={})))
    flags = {row.arm.pattern: row.speed.flags for contest in summary.contests for row in contest.rows if row.speed}
    assert flags["null_pool"][0].startswith("connection pool: tasks wait ")
    assert flags[OURS] == []


def test_a_driver_that_blocks_is_not_called_a_broken_pattern(tmp_path: Path) -> None:
    blocked = {("gevent", "with_session"): {CHECKS[0]: "HubBlocked: only 1 of 20 ticks"}}
    directory = write_results(tmp_path, replace(SMALL, pools=("gevent",), broken=blocked))
    summary = summarise(directory)
    contest = summary.contest("patterns/gevent/transfer")
    assert contest
    row = contest.row("gevent-4-with_session")
    assert row
    assert (row.broken, row.blocked, row.word, row.speed) == (True, True, "driver blocks", None)
    (standing,) = [one for one in summary.standings if one.arm.pattern == "with_session"]
    assert (standing.broken, standing.blocked) == (0, 1)
    assert "1 were not run: their driver blocks the green hub" in " ".join(terminal(directory).split())
    report(directory)
    text = (directory / "index.html").read_text()
    assert '<span class="broken">driver blocks</span>' in text
    assert '<span class="broken">broken' not in text


def test_memory_that_was_measured_once_counts_once(tmp_path: Path) -> None:
    directory = write_results(tmp_path, replace(PLAN, pools=("prefork",), workloads=("transfer",), sweep=False))
    change(directory, "UPDATE cells SET pss_bytes = 0 WHERE batch > 1")
    sizes = {round(row.most("pss_bytes") / 2**20) for contest in summarise(directory).contests for row in contest.rows}
    assert sizes == {254, 830}


def test_no_contest_is_taken_to_be_calmer_than_half_of_them_are(summary: Summary) -> None:
    floors = sorted(contest.floors["cpu"] for contest in summary.contests)
    assert floors.count(floors[0]) >= len(floors) // 2


# Open load

SWEPT = replace(PLAN, pools=("prefork",), workloads=("transfer",), baselines=(), batches=1)


def test_the_knee_lies_between_the_last_rate_that_held_and_the_first_that_did_not(summary: Summary) -> None:
    (sweep,) = [one for one in summary.sweeps if (one.workload, one.arm.pool) == ("transfer", "prefork")]
    assert sweep.knee
    assert sweep.knee.sweeps == len(sweep.kept) == len(sweep.sweeps) == 5
    assert sweep.knee.low <= sweep.knee.middle <= sweep.knee.high
    assert sweep.knee.coverage == 0.9375
    for steps, kept in zip(sweep.sweeps, sweep.kept, strict=True):
        assert kept
        assert kept.met
        beyond = [step for step in steps if step.offered_per_s > kept.offered_per_s]
        assert beyond
        assert not beyond[0].met
        assert [step.offered_per_s for step in steps] == sorted(step.offered_per_s for step in steps)


def test_the_knee_is_the_median_of_the_sweeps_and_goes_from_the_least_to_the_most(tmp_path: Path) -> None:
    directory = write_results(tmp_path, SWEPT)
    change(directory, "UPDATE steps SET met = 0")
    for sweep, rate in ((1, 80), (2, 200), (3, 120), (4, 150)):
        change(directory, "UPDATE steps SET met = 1 WHERE sweep = ? AND offered_per_s <= ?", sweep, rate)
    found = summarise(directory).sweeps[0]
    rates = sorted(step.offered_per_s if step else 0.0 for step in found.kept)
    assert rates[0] == 0.0, "one sweep kept it at no rate"
    assert len(set(rates)) > 3
    assert found.knee
    assert (found.knee.low, found.knee.middle, found.knee.high) == (rates[0], rates[2], rates[4])


def test_a_step_that_held_by_luck_above_the_knee_does_not_count(tmp_path: Path) -> None:
    directory = write_results(tmp_path, SWEPT)
    before = summarise(directory).sweeps[0].knee
    change(directory, "UPDATE steps SET met = 1 WHERE offered_per_s = (SELECT max(offered_per_s) FROM steps)")
    assert summarise(directory).sweeps[0].knee == before


def test_late_and_skipped_arrivals_are_counted_and_both_latencies_shown(markdown: str, summary: Summary) -> None:
    (sweep,) = [one for one in summary.sweeps if (one.workload, one.arm.pool) == ("transfer", "prefork")]
    late, skipped = (sum(getattr(step, name) for step in sweep.steps) for name in ("late", "skipped"))
    assert late
    assert skipped
    assert re.search(rf"transfer, prefork 4 .* {late} +{skipped}", printed(summary))
    assert "| p99.9 ms | p99.9 uncorrected | late | skipped |" in markdown


def test_a_broken_sweep_shows_no_rate(tmp_path: Path) -> None:
    directory = write_results(tmp_path, replace(SWEPT, broken={("prefork", OURS): {CHECKS[0]: "3: a"}}))
    (sweep, *_) = summarise(directory).sweeps
    assert sweep.breaches[0].name == CHECKS[0]
    assert (sweep.steps, sweep.knee) == ([], None)
    assert re.search(r"transfer, prefork 4 \| \*\*broken\*\* \|( - \|){2,}", report(directory))


def test_the_histogram_files_are_of_the_tasks_at_the_knee(tmp_path: Path) -> None:
    """Corrected: from when a task was due. A generator that was 40 ms behind looks 40 ms better without it."""
    directory = write_results(tmp_path, replace(SWEPT, sweeps=1))
    (sweep, *_) = summarise(directory).sweeps
    (kept,) = sweep.kept
    assert kept

    def row(number: int, slice_: int) -> TaskRow:
        due, name = float(number), kept.arm.name
        times = (due, due + 0.04, due + 0.05, due + 0.06)
        return TaskRow(slice_, name, "transfer", number, str(number), *times, "success", 1, 0.0, 0.0)

    store = Store(directory, "histogram", replace(summarise(directory).facts, options={}))
    rows = [row(number, 7 if number < 50 else 8) for number in range(60)]
    store.add_sweep([replace(kept, arm=replace(kept.arm, pool="threads"), slice=7)], rows)
    report(directory)
    text = {path.name.split(".")[-2]: path.read_text() for path in directory.glob("transfer-threads-*.hgrm")}
    assert "[Max     =       60.000, Total count    =           50]" in text["corrected"]
    assert "[Max     =       20.000, Total count    =           50]" in text["uncorrected"]
    assert not list(directory.glob("transfer-prefork-*")), "no rows were kept of it"


# What to choose


def test_waiting_wants_concurrency_and_work_does_not(found: list[Choice]) -> None:
    work, waiting = choice(found, "for transfer"), choice(found, "for slow_io")
    assert (work.choice, work.changed) == ("prefork 4", False)
    assert waiting.choice.endswith(" 16")
    assert (waiting.against, waiting.changed) == ("prefork 4", True)
    assert waiting.goodput
    assert waiting.goodput.verdict == "faster"
    assert waiting.goodput.estimate.middle > 3


def test_where_nothing_is_better_the_reference_and_auto_are_kept(found: list[Choice]) -> None:
    for pool in PLAN.pools:
        one = choice(found, f"under {pool}")
        assert (one.choice, one.changed) == (f"auto ({AUTOMATIC[pool]})", False)


def faster(pool: str, strategy: str, factor: float) -> Callable[[Arm, str], float]:
    return lambda arm, workload: factor if (arm.pool, arm.strategy) == (pool, strategy) else 1.0


def test_auto_is_contradicted_where_the_evidence_does(tmp_path: Path) -> None:
    plan = replace(
        PLAN, pools=("prefork", "threads"), speed=faster("prefork", "local", 1.4), concurrencies=(), sweep=False
    )
    found = recommend(summarise(write_results(tmp_path, plan)))
    one = choice(found, "under prefork")
    assert (one.choice, one.against, one.changed) == ("local", "auto (per_process)", True)
    assert choice(found, "under threads").choice == "auto (scoped)"
    assert "Strategy: local under prefork; auto under threads." in terminal(tmp_path)


def test_with_few_workers_the_reference_is_kept_and_called_undecided(tmp_path: Path) -> None:
    plan = replace(SMALL, batches=2, speed=faster("threads", "local", 3.0))
    (one,) = recommend(summarise(write_results(tmp_path, plan)))
    assert (one.choice, one.against, one.changed) == (
        "undecided: too few workers; auto (scoped)", "local", False,
    )  # fmt: skip


def test_a_broken_arm_is_never_chosen_however_fast(tmp_path: Path) -> None:
    plan = replace(PLAN, pools=("prefork",), workloads=("slow_io",), sweep=False, broken={})
    directory = write_results(tmp_path, plan)
    assert choice(recommend(summarise(directory)), "for slow_io").choice == "prefork 16"
    change(directory, """UPDATE cells SET verdicts = ? WHERE arm LIKE '%"concurrency": 16%'""", BREACH)
    assert choice(recommend(summarise(directory)), "for slow_io").choice == "prefork 4"


def test_losses_are_printed_beside_wins(tmp_path: Path) -> None:
    def speed(arm: Arm, workload: str) -> float:
        return 1.3 if arm.pattern == "with_session" else 1.0

    plan = replace(PLAN, pools=("prefork",), concurrencies=(), sweep=False, speed=speed)
    text = report(write_results(tmp_path, plan))
    assert re.search(r"\| with_session \| \*\*0 of 2\*\* \| \*\*1\.\d\d \[1\.\d+, 1\.\d+\] faster\*\*", text)
    assert re.search(r"\| null_pool \| \*\*0 of 2\*\* \| \*\*0\.\d\d \[0\.\d\d, 0\.\d\d\] slower\*\*", text)


def test_one_worker_pool_is_no_comparison_of_worker_pools(tmp_path: Path) -> None:
    plan = replace(PLAN, pools=("gevent",), concurrencies=(), sweep=False)
    found = recommend(summarise(write_results(tmp_path, plan)))
    assert [(one.topic, one.choice) for one in found] == [("Strategy", "auto (scoped)")]


# Terminal and Markdown


def test_the_terminal_shows_no_number_of_a_broken_arm(tmp_path: Path) -> None:
    text = terminal(write_results(tmp_path, SMALL))
    lines = [line for line in text.splitlines() if re.match(r"recipe +broken", line)]
    assert lines
    assert not any(re.search(r"\d", line) for line in lines)
    assert "212 times, as in: shared" in text


@pytest.mark.parametrize("width", [80, 110])
def test_the_tables_of_the_terminal_fit_and_are_whole(summary: Summary, tmp_path: Path, width: int) -> None:
    small = terminal(write_results(tmp_path, SMALL), width)
    for text in (printed(summary, width), small):
        assert max(len(line) for line in text.splitlines()) <= width
        assert "…" not in text
    assert "patterns/threads/transfer: 6 restarts, 24 rounds, A/A floor ±" in small


def test_markdown_has_a_line_for_each_pattern_and_worker_pool(markdown: str) -> None:
    for name, pools in (("celery-alchemy auto", 4), ("with_session", 4), ("process_init", 2)):
        assert len(re.findall(rf"^\| {name} \| \*\*\d of \d\*\* \|", markdown, re.MULTILINE)) == pools
    tables = [block for block in markdown.split("\n\n") if block.startswith("|")]
    assert len(tables) > 5
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
