"""The gate counts what a task costs: it lets pass what is as it was, and catches what has become dearer."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from sqlalchemy import URL
from support import databases

from celery_alchemy.loadtests.overhead import baseline, callgrind, child, counts, processes, walk
from celery_alchemy.loadtests.overhead.__main__ import POOLS, compared, limit_of
from celery_alchemy.loadtests.overhead.baseline import Count
from celery_alchemy.loadtests.overhead.counts import ROW
from celery_alchemy.loadtests.overhead.rows import ROWS

pytestmark = pytest.mark.timeout(300)

LISTENING = "support.listening:ListeningStrategy"
ROWS_COUNTED = (ROW["one SELECT"], ROW["ten statements"])


@pytest.fixture(scope="module")
def url(postgresql_server: URL, run_name: str) -> Iterator[str]:
    with (
        databases.new_postgresql(postgresql_server, f"{run_name}_counts") as database,
        processes.database(database.url("counts")) as counted,
    ):
        yield counted


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes that are counted import the strategy of the tests."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def tallied(url: str, strategy: str) -> list[Count]:
    """Count with a strategy, and call it local: as it is in the baseline."""
    return [
        Count(one.kind, "solo, local", one.row, one.with_layer, one.by_hand)
        for one in counts.tallies(url, [("solo", strategy)], ROWS_COUNTED)
    ]


def test_a_listener_on_each_statement_is_caught(url: str) -> None:
    before = tallied(url, "local")
    known = baseline.as_baseline(before)
    assert baseline.regressions(tallied(url, "local"), known) == []
    above = baseline.regressions(tallied(url, LISTENING), known)
    assert {(one.count.kind, one.count.row) for one in above} >= {("calls", "one SELECT"), ("calls", "ten statements")}
    worst, was = above[0], {(one.kind, one.row): one for one in before}
    calls = was[worst.count.kind, worst.count.row]
    assert f"solo, local, {worst.count.row}" in str(worst)
    for number in (calls.multiple, worst.count.multiple):
        assert f"{number:.3f}" in str(worst)


def test_round_trips_are_three_for_a_statement_and_one_for_reading(url: str) -> None:
    found = {one.row: one.with_layer for one in counts.round_trips(url)}
    assert found == {
        "one SELECT": 3,
        "one INSERT": 3,
        "ten statements": 12,
        "one SELECT, read_only": 1,
        "one INSERT, exactly once first": 5,
        "one INSERT, exactly once last": 5,
    }
    known = baseline.as_baseline(counts.round_trips(url))
    more = [Count("round trips", "solo, local", "one INSERT", 4)]
    assert [str(one) for one in baseline.regressions(more, known)] == [
        "round trips, solo, local, one INSERT: 4; the baseline is 3 (+33.3%, allowed +2%)"
    ]


def above_target(committed: baseline.Baseline) -> list[str]:
    """Name the committed instructions of ordinary tasks that are above their target."""
    found = []
    for where, rows in committed["instructions"].items():
        pool = where.split(",")[0]
        for name, (ours, hand) in rows.items() if pool in child.WORKER_POOLS else ():
            ratio, added = limit_of(ROW[name], pool), ROW[name].added
            if pool == "prefork" and added is not None:
                continue  # its soft time limit is held back: its target is a ratio
            if (ratio is not None and ours > ratio * hand) or (added is not None and ours - hand > added):
                found.append(f"{where}, {name}: {ours:,} by {hand:,}")
    return found


def test_the_committed_instructions_meet_the_targets() -> None:
    """The gate alone would let a row go above its target by 2 % at a time, each time the baseline is written."""
    committed: dict[str, baseline.Baseline] = json.loads(baseline.PATH.read_text())
    assert [line for one in committed.values() for line in above_target(one)] == []
    assert {name for one in committed.values() for name in one["instructions"]["solo, local"]} == set(ROW)


def test_instructions_above_their_target_are_named() -> None:
    rows = {"one SELECT": (1003, 1000), "one INSERT, delay_on_commit": (1_038_500, 1_000_000)}
    prefork = {"one SELECT": (1035, 1000), "one INSERT": (1029, 1000)}
    assert above_target({"instructions": {"solo, local": rows, "prefork, per_process": prefork}}) == [
        "solo, local, one SELECT: 1,003 by 1,000",
        "solo, local, one INSERT, delay_on_commit: 1,038,500 by 1,000,000",
        "prefork, per_process, one SELECT: 1,035 by 1,000",
    ]


def test_a_walk_that_finds_nothing_is_no_short_one(url: str) -> None:
    """A recording that looked in the wrong place would let every gate pass."""
    assert min(one.with_layer for one in counts.walks(url)) > 0
    with pytest.raises(ValueError, match="Nothing of strategies and workers was called"):
        walk.measure([])


@pytest.mark.skipif(not callgrind.is_available(), reason="valgrind is not installed")
def test_instructions_are_the_same_on_every_run(url: str) -> None:
    found = [
        callgrind.count(side, "solo", "local", url, ["nothing"], (0,))["nothing"].median
        for side in ("by hand", "with the layer", "with the layer")
    ]
    assert found[1] == pytest.approx(found[2], rel=baseline.TOLERANCE / 2)
    assert found[0] < found[1]


def test_what_is_a_bit_above_the_baseline_passes() -> None:
    known = {"calls": {"solo, local": {"one SELECT": (500, 500)}}}
    assert baseline.regressions([Count("calls", "solo, local", "one SELECT", 509, 500)], known) == []
    (above,) = baseline.regressions([Count("calls", "solo, local", "one SELECT", 511, 500)], known)
    assert above.share == pytest.approx(0.022)


def test_the_committed_baseline_knows_all_that_is_counted() -> None:
    committed = json.loads(baseline.PATH.read_text())
    assert set(committed) >= {"3.11"}
    for python, kinds in committed.items():
        assert {"calls", "blocks", "instructions", "round trips", "walk: files"} <= set(kinds), python
        for pool, strategy in counts.TALLY_CELLS:
            assert set(kinds["calls"][f"{pool}, {strategy}"]) == {row.name for row in ROWS}


def test_a_regression_is_an_exit_code(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "baseline.json"
    monkeypatch.setattr(baseline, "PATH", path)
    monkeypatch.setattr(counts, "TALLY_CELLS", (("solo", "local"),))
    monkeypatch.setattr(counts, "ROWS", ROWS_COUNTED)
    written = CliRunner().invoke(counts.main, ["--url", url, "--write", "--no-instructions"])
    assert written.exit_code == 0, written.output
    same = CliRunner().invoke(counts.main, ["--url", url, "--no-instructions"])
    assert same.exit_code == 0, same.output
    values = json.loads(path.read_text())
    values[baseline.key()]["round trips"]["solo, local"]["one SELECT, read_only"] = [0.5, 1]
    path.write_text(json.dumps(values))
    above = CliRunner().invoke(counts.main, ["--url", url, "--no-instructions"])
    assert above.exit_code == 1
    assert "one SELECT, read_only" in above.output


@pytest.mark.parametrize("pool", POOLS)
def test_each_row_says_whether_its_target_is_met(pool: str) -> None:
    told = {row.name: compared(row, pool, added=1e9, ratio=9.9) for row in ROWS}
    for row in ROWS:
        has_target = pool != "asyncio" and not (row.added is None and row.ratio is None)
        assert told[row.name].endswith("missed") if has_target else told[row.name] == ""
        assert compared(row, pool, added=0, ratio=0.5).endswith("met") or not has_target
