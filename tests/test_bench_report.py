"""What a run says: the rows, the recommendation, and the page in a real browser."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console
from support import chromium
from support.bench_results import AUTOMATIC, CHECKS, Plan, write_results

from celery_alchemy.loadtests.bench.results import BATCHES_FILE, SWEEP_FILE, Arm
from celery_alchemy.loadtests.patterns import OURS
from celery_alchemy.loadtests.reports import write_chart, write_report
from celery_alchemy.loadtests.reports.automatic import AutoCheck
from celery_alchemy.loadtests.reports.page import write_page
from celery_alchemy.loadtests.reports.reading import summarise
from celery_alchemy.loadtests.reports.recommendation import Recommendation, recommend
from celery_alchemy.loadtests.reports.style import STYLE
from celery_alchemy.loadtests.reports.summary import Summary

PLAN = Plan(
    pools=("prefork", "threads", "gevent", "solo"),
    workloads=("transfer", "slow_io"),
    baselines=("recipe", "with_session", "null_pool", "process_init"),
)
SPEED_WORDS = ("faster", "slower", "cheaper", "dearer")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_results(tmp_path_factory.mktemp("results"), PLAN)


@pytest.fixture(scope="module")
def summary(directory: Path) -> Summary:
    return summarise(directory)


@pytest.fixture(scope="module")
def found(summary: Summary) -> Recommendation:
    return recommend(summary)


def advice(found: Recommendation, workload: str, topic: str) -> tuple[str, str]:
    """Return the choice, and everything that is said for and against it."""
    (of_workload,) = [one for one in found.workloads if one.workload == workload]
    (one,) = [one for one in of_workload.advice if one.topic == topic]
    return one.choice, " ".join([*one.evidence, *one.limits])


def check(found: Recommendation, pool: str) -> AutoCheck:
    (one,) = [one for one in found.automatic if one.pool == pool]
    return one


# Rows


def test_an_arm_without_breach_has_all_its_numbers(summary: Summary) -> None:
    contest = summary.contest("patterns/prefork/transfer")
    assert contest
    assert (contest.kind, contest.pool, contest.batches, contest.rounds) == ("patterns", "prefork", 3, 30)
    row = contest.row("prefork-4-null_pool")
    assert row
    assert row.speed
    assert row.speed.goodput_per_s.n == 30
    goodput, cpu, database = (row.ratio(name) for name in ("goodput", "cpu", "database_cpu"))
    assert goodput
    assert cpu
    assert database
    assert (goodput.verdict, cpu.verdict, database.verdict) == ("slower", "dearer", "dearer")
    assert goodput.estimate.median == pytest.approx(0.62, rel=0.1)
    assert database.estimate.median == pytest.approx(9, rel=0.15)
    assert list(goodput.batches) == [1, 2, 3]
    assert (row.peak_connections, row.promised_connections) == (4, 4)
    assert row.speed.phases.keys() == {"queue", "checkout", "database", "run"}
    assert row.speed.latency
    assert row.speed.latency.n == 9000


def test_the_reference_is_first_and_its_copy_second_and_sets_the_floor(summary: Summary) -> None:
    for contest in summary.contests:
        assert contest.rows[0].reference
        assert contest.rows[0].speed
        assert contest.rows[0].speed.ratios == {}
        assert contest.rows[1].arm == replace(contest.rows[0].arm, copy=1)
        assert contest.floors.keys() == {"goodput", "cpu", "database_cpu", "p50", "p95", "p99"}
        assert all(1 < floor < 1.5 for floor in contest.floors.values())
        copy = contest.rows[1].ratio("goodput")
        assert copy
        assert not copy.shown, "an arm cannot be beyond the floor that it sets"


def test_a_broken_arm_has_breaches_and_no_speed_anywhere(directory: Path, summary: Summary) -> None:
    broken = [row for contest in summary.contests for row in contest.rows if row.broken]
    assert {row.arm.pattern for row in broken} == {"recipe"}
    assert {row.arm.pool for row in broken} == {"threads", "gevent"}
    for row in broken:
        assert row.speed is None
        assert row.ratio("goodput") is None
        assert all(breach.name in CHECKS and breach.detail for breach in row.breaches)
        assert row.errors["InvalidRequestError"] == 45


def test_a_breach_in_the_last_batch_takes_all_speed_away(tmp_path: Path) -> None:
    """It was measured in all of them, and looked fast."""
    plan = replace(PLAN, pools=("threads",), workloads=("transfer",), broken={}, concurrencies=(), sweep=False)
    directory = write_results(tmp_path, plan)
    lines = (directory / BATCHES_FILE).read_text().splitlines()
    last = json.loads(lines[-1])
    (cell,) = [cell for cell in last["cells"] if cell["arm"]["pattern"] == "with_session"]
    cell["verdicts"][0] = {"name": CHECKS[0], "passed": False, "detail": "1: abc"}
    (directory / BATCHES_FILE).write_text("".join(f"{line}\n" for line in [*lines[:-1], json.dumps(last)]))
    contest = summarise(directory).contest("patterns/threads/transfer")
    assert contest
    row = contest.row("threads-4-with_session")
    assert row
    assert row.speed is None
    assert [(breach.name, breach.batches) for breach in row.breaches] == [(CHECKS[0], (3,))]
    assert contest.compare("threads-4-with_session", "threads-4-null_pool", "goodput") is None


def test_nothing_is_claimed_where_the_reference_is_broken(tmp_path: Path) -> None:
    broken = {("threads", OURS): {CHECKS[1]: "9 times"}}
    plan = replace(PLAN, pools=("threads",), workloads=("transfer",), broken=broken, concurrencies=(), sweep=False)
    summary = summarise(write_results(tmp_path, plan))
    (contest,) = summary.contests
    assert contest.note == "The reference is broken, so there is nothing to divide by."
    assert all(row.speed is None or row.speed.ratios == {} for row in contest.rows)
    found = recommend(summary)
    assert check(found, "threads").agrees is False
    assert advice(found, "transfer", "strategy")[0] == "no evidence"
    assert "celery-alchemy kept every invariant in 0 of" in found.in_short[0]


def test_noise_and_a_busy_generator_are_flagged(tmp_path: Path) -> None:
    plan = replace(PLAN, pools=("prefork",), foreign_cpus=0.9, generator_share=0.85, sweep=False)
    summary = summarise(write_results(tmp_path, plan))
    flags = {flag.partition(":")[0] for contest in summary.contests for row in contest.rows for flag in row.flags}
    assert flags == {"foreign CPU", "generator-bound"}
    assert "kept more than 0.3 CPUs busy" in summary.flags[0]
    assert not any(row.flags for contest in summarise_quiet(tmp_path).contests for row in contest.rows)


def summarise_quiet(tmp_path: Path) -> Summary:
    return summarise(write_results(tmp_path / "quiet", replace(PLAN, pools=("prefork",), sweep=False)))


def test_the_knee_lies_between_the_last_rate_that_held_and_the_first_that_did_not(summary: Summary) -> None:
    (sweep,) = [one for one in summary.sweeps if (one.workload, one.arm.pool) == ("transfer", "prefork")]
    assert sweep.at_objective
    assert sweep.knee
    assert sweep.at_objective.met
    assert not sweep.knee.met
    assert sweep.at_objective.offered_per_s < sweep.knee.offered_per_s
    assert [step.offered_per_s for step in sweep.steps] == sorted(step.offered_per_s for step in sweep.steps)


def test_a_step_that_held_by_luck_above_the_knee_does_not_count(tmp_path: Path) -> None:
    directory = write_results(tmp_path, replace(PLAN, pools=("prefork",), workloads=("transfer",)))
    steps = [json.loads(line) for line in (directory / SWEEP_FILE).read_text().splitlines()]
    before = summarise(directory).sweeps[0].at_objective
    steps[-1]["met"] = True
    (directory / SWEEP_FILE).write_text("".join(f"{json.dumps(step)}\n" for step in steps))
    assert summarise(directory).sweeps[0].at_objective == before


def test_a_driver_that_blocks_is_not_called_a_broken_pattern(tmp_path: Path) -> None:
    blocked = {("gevent", "with_session"): {CHECKS[0]: "HubBlocked: only 1 of 20 ticks"}}
    plan = replace(PLAN, pools=("gevent",), workloads=("transfer",), broken=blocked)
    directory = write_results(tmp_path, plan)
    summary = summarise(directory)
    contest = summary.contest("patterns/gevent/transfer")
    assert contest
    row = contest.row("gevent-4-with_session")
    assert row
    assert (row.broken, row.blocked, row.word, row.speed) == (True, True, "driver blocks", None)
    found = recommend(summary)
    assert "No combination of worker pool, pattern and workload that was run broke an invariant." in found.in_short[0]
    assert "driver blocks the green hub (with_session under gevent)" in found.in_short[0]
    (standing,) = [one for one in found.standings if one.pattern == "with_session"]
    assert (standing.broken, standing.blocked) == (0, 1)
    text = write_page(directory).read_text()
    assert '<span class="broken">driver blocks</span>' in text
    assert '<span class="broken">broken' not in text


def test_memory_that_was_measured_once_counts_once(tmp_path: Path) -> None:
    directory = write_results(tmp_path, replace(PLAN, pools=("prefork",), workloads=("transfer",), sweep=False))
    batches = [json.loads(line) for line in (directory / BATCHES_FILE).read_text().splitlines()]
    for batch in batches:
        for cell in batch["cells"]:
            cell["pss_bytes"] *= batch["number"] == 1
    (directory / BATCHES_FILE).write_text("".join(f"{json.dumps(batch)}\n" for batch in batches))
    sizes = {round(row.pss_bytes / 2**20) for contest in summarise(directory).contests for row in contest.rows}
    assert sizes == {254, 830}


def test_a_broken_sweep_shows_no_rate(tmp_path: Path) -> None:
    broken = {("prefork", OURS): {CHECKS[0]: "3: a"}}
    (sweep, *_) = summarise(write_results(tmp_path, replace(PLAN, pools=("prefork",), broken=broken))).sweeps
    assert sweep.breaches[0].name == CHECKS[0]
    assert (sweep.steps, sweep.at_objective, sweep.knee) == ([], None, None)


def test_the_summary_is_json_without_what_json_does_not_know(directory: Path) -> None:
    written = write_report(Console(file=StringIO(), width=110), directory)
    assert {path.name for path in written} == {"index.html", "summary.json", "summary.md"}
    content = json.loads((directory / "summary.json").read_text())
    names = {row["arm"]["name"] for contest in content["contests"] for row in contest["rows"]}
    assert "prefork-4-celery-alchemy-auto-copy" in names
    assert "slices" not in json.dumps(content)


def test_no_contest_is_taken_to_be_calmer_than_half_of_them_are(summary: Summary) -> None:
    floors = sorted(contest.floors["cpu"] for contest in summary.contests)
    assert floors.count(floors[0]) >= len(floors) // 2


# Recommendation


def test_waiting_wants_concurrency_and_work_does_not(found: Recommendation) -> None:
    assert advice(found, "transfer", "worker pool")[0] == "prefork"
    assert advice(found, "transfer", "concurrency")[0] == "4"
    choice, said = advice(found, "slow_io", "concurrency")
    assert choice == "16"
    assert "It is the largest that was measured" in said
    pool, said = advice(found, "slow_io", "worker pool")
    assert pool in {"prefork", "threads"}
    assert "n = 30 rounds in 3 batches, 95.7% interval" in said
    assert "faster" in said


def test_where_nothing_is_better_the_reference_and_auto_are_kept(found: Recommendation) -> None:
    choice, said = advice(found, "transfer", "strategy")
    assert choice == "auto (per_process)"
    assert "No strategy is shown to be better, so auto is kept" in said
    for pool in PLAN.pools:
        assert check(found, pool).agrees is True
        assert check(found, pool).took == AUTOMATIC[pool]
        assert "better than auto in 0, worse in 0" in check(found, pool).evidence[0]


def test_auto_is_contradicted_where_the_evidence_does(tmp_path: Path) -> None:
    def speed(arm: Arm, workload: str) -> float:
        return 1.4 if (arm.pool, arm.strategy) == ("prefork", "local") else 1.0

    found = recommend(summarise(write_results(tmp_path, replace(PLAN, pools=("prefork", "threads"), speed=speed))))
    assert check(found, "prefork").agrees is False
    assert any("local to auto: goodput 1.4" in line for line in check(found, "prefork").evidence)
    assert check(found, "threads").agrees is True
    assert advice(found, "transfer", "strategy")[0] == "local"
    (strategy,) = [one for one in found.overall if one.topic == "strategy"]
    assert strategy.choice == "auto, except under prefork"


def test_losses_are_printed_beside_wins(tmp_path: Path) -> None:
    def speed(arm: Arm, workload: str) -> float:
        return 1.3 if arm.pattern == "with_session" else 1.0

    found = recommend(summarise(write_results(tmp_path, replace(PLAN, pools=("prefork",), speed=speed))))
    (of_workload,) = [one for one in found.workloads if one.workload == "transfer"]
    assert any(re.match("with_session under prefork: goodput 1.*: faster than", line) for line in of_workload.losses)
    assert any(re.match("null_pool under prefork: goodput 0.*: slower than", line) for line in of_workload.wins)
    assert "faster in 2, slower in 2" in found.in_short[-2]
    assert found.in_short[-1].startswith("A plain `with Session(engine)` against celery-alchemy")


def test_connections_are_what_was_seen_and_what_was_promised(found: Recommendation) -> None:
    choice, said = advice(found, "transfer", "connection pool")
    assert choice == "the default: 4 used, 8 at most"
    assert "at most 4 connections seen at concurrency 4, 8 promised" in said


def test_without_a_sweep_that_is_said(tmp_path: Path) -> None:
    found = recommend(summarise(write_results(tmp_path, replace(PLAN, pools=("prefork", "threads"), sweep=False))))
    assert "No sweep was run" in advice(found, "transfer", "worker pool")[1]


def test_one_worker_pool_is_no_comparison_of_worker_pools(tmp_path: Path) -> None:
    plan = replace(PLAN, pools=("gevent",), concurrencies=(), sweep=False)
    found = recommend(summarise(write_results(tmp_path, plan)))
    assert advice(found, "transfer", "worker pool")[0] == "no evidence"
    assert advice(found, "transfer", "strategy")[0] == "auto (scoped)"
    assert "Worker pools were not compared with each other, so none is recommended." in found.in_short


# Terminal and Markdown


def test_the_terminal_shows_no_number_of_a_broken_arm(directory: Path) -> None:
    out = StringIO()
    write_report(Console(file=out, width=110), directory)
    assert "In short" in out.getvalue()
    lines = [line for line in out.getvalue().splitlines() if line.startswith("recipe") and "BROKEN" in line]
    for line in lines:
        assert not re.search(r"\d", line)
    assert max(len(line) for line in out.getvalue().splitlines()) <= 110


def test_the_tables_of_the_terminal_fit_and_are_whole(tmp_path: Path) -> None:
    out = StringIO()
    plan = replace(PLAN, pools=("threads",), workloads=("transfer",))
    write_report(Console(file=out, width=110), write_results(tmp_path, plan))
    assert "patterns/threads/transfer: 30 rounds in 3 batches, A/A floor ±" in out.getvalue()
    assert "…" not in out.getvalue()
    assert re.search(r"null_pool +ok +\d+ +0\.\d\d \[0\.\d\d, 0\.\d\d\] slower +dearer \d", out.getvalue())
    assert re.search(r"recipe +BROKEN( +-){7}", out.getvalue())
    assert "recipe: every task had a Session of its own: no. 212 times" in out.getvalue()


def test_markdown_has_a_line_for_each_pattern_and_workload(directory: Path) -> None:
    write_report(Console(file=StringIO()), directory)
    text = (directory / "summary.md").read_text()
    for name in ("celery-alchemy auto", *PLAN.baselines):
        assert re.search(rf"^\| {name} \| \d+ of \d+", text, re.MULTILINE)
    assert re.search(r"^\| `slow_io` \|", text, re.MULTILINE)
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


# The page, as text

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Reader(HTMLParser):
    """Checks that tags are closed in order; collects what the tests ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        self.ids += [value for name, value in attrs if name == "id" and value]
        for name, value in attrs:
            if value and name in {"href", "xlink:href", "src"}:
                self.references.append(value)
            self.references += re.findall(r"url\(([^)]*)\)", value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a start"
        assert self.open.pop() == tag


def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text())
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def page(directory: Path) -> Path:
    write_report(Console(file=StringIO()), directory)
    return directory / "index.html"


def test_the_page_needs_nothing_but_itself(page: Path) -> None:
    reader = read(page)
    assert len(set(reader.ids)) == len(reader.ids)
    for reference in reader.references:
        if reference.startswith("#"):
            assert reference[1:] in reader.ids
        else:
            assert reference == "data:," or (page.parent / reference).exists(), reference
    assert not {tag for tag, _ in reader.tags} & {"script", "iframe", "img", "object"}


def test_every_chart_has_words_and_takes_its_colours_from_the_page(page: Path) -> None:
    charts = [found for tag, found in read(page).tags if tag == "svg"]
    # Forest plots, latency, throughput, connections, memory, phases.
    assert len(charts) == (8 + 2) + 2 + 2 + 1 + 1 + 2
    assert all(found["role"] == "img" and len(found["aria-label"] or "") > 40 for found in charts)
    text = page.read_text()
    assert re.findall(r"(?:fill|stroke): *#[0-9a-f]{3,6}", text) == []
    used, defined = set(re.findall(r"var\((--[a-z0-9-]+)\)", text)), set(re.findall(r"(--[a-z0-9-]+):", STYLE))
    assert used <= defined


def test_what_came_from_elsewhere_is_escaped(page: Path) -> None:
    text = page.read_text()
    assert "An EPYC &lt;7B13&gt;" in text
    assert "&lt;this Session&#x27;s transaction&gt;" in text


def test_a_broken_arm_is_named_with_its_breach_and_without_speed(page: Path) -> None:
    text = page.read_text()
    rows = re.findall(r'<tr><th scope="row">recipe</th>(?:(?!</tr>).)*broken</span>(?:(?!</tr>).)*</tr>', text)
    numbers = [row for row in rows if len(re.findall("<td", row)) == 12]
    assert numbers, "in the tables of the contests"
    for row in numbers:
        assert re.search(r"<small>[^<]*: no</small>", row)
        assert not re.search(r">[^<]*\d[^<]*<", row.partition("<td")[2].replace("8: 0c3f", ""))


SECTIONS = (
    "environment", "correctness", "patterns", "pools", "latency", "throughput", "connections", "memory", "phases",
    "round-trips", "errors", "recommendation", "raw",
)  # fmt: skip


def test_the_sections_come_in_their_order(page: Path) -> None:
    assert re.findall(r'<section id="([a-z-]+)">', page.read_text()) == list(SECTIONS)
    assert page.read_text().index("In short") < page.read_text().index('<section id="environment">')


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (replace(PLAN, sweep=False), ["No sweep was run"]),
        (
            replace(PLAN, pools=("gevent",), concurrencies=(), sweep=False),
            ["Worker pools were not compared with each other"],
        ),
        (
            replace(
                PLAN,
                pools=("threads",),
                broken={("threads", name): {CHECKS[0]: "1: a"} for name in (OURS, *PLAN.baselines)},
            ),
            ["Nothing was measured", "Memory was not measured, or none of the arms is right", "nothing is recommended"],
        ),
        (replace(PLAN, rounds=0, sweep=False), ["Nothing was measured", "nothing is recommended", "ok</span>"]),
        (replace(PLAN, batches=1, rounds=3, sweep=False), ["3 rounds are too few for a 95 % interval"]),
    ],
    ids=["no sweep", "one worker pool", "everything broken", "checked only", "too short"],
)
def test_what_is_missing_is_said_and_leaves_no_empty_box(tmp_path: Path, plan: Plan, said: list[str]) -> None:
    page = write_page(write_results(tmp_path, replace(plan, workloads=("transfer",))))
    text = page.read_text()
    for sentence in said:
        assert sentence in text
    read(page)
    for name, content in re.findall(r'<section id="([a-z-]+)"><h2>[^<]*</h2>(.*?)</section>', text, re.DOTALL):
        assert re.sub(r"<[^>]*>|\s", "", content), name
    assert not re.search(r'aria-label="[^"]*"></div>', text)
    if plan.rounds < 6 or all(name in {pattern for _, pattern in plan.broken} for name in (OURS, "with_session")):
        assert not re.search(rf'class="(good|bad)">({"|".join(SPEED_WORDS)})', text)


def test_an_empty_directory_of_a_run_that_was_stopped_early_is_a_page_too(tmp_path: Path) -> None:
    directory = write_results(tmp_path, replace(PLAN, pools=("prefork",), workloads=("transfer",)))
    (directory / BATCHES_FILE).unlink()
    (directory / SWEEP_FILE).unlink()
    write_report(Console(file=StringIO()), directory)
    assert "Nothing was compared: no contest was run." in (directory / "index.html").read_text()


# The page, in a browser

CHARTS = """
[...document.querySelectorAll('svg.chart')].map(svg => {
  const box = svg.getBoundingClientRect(), drawn = svg.getBBox(), view = svg.viewBox.baseVal;
  const out = [...svg.querySelectorAll('text')].filter(text => {
    const r = text.getBoundingClientRect();
    return r.left < box.left - 2 || r.right > box.right + 2 || r.top < box.top - 2 || r.bottom > box.bottom + 2;
  });
  return {label: svg.getAttribute('aria-label'), width: box.width, height: box.height,
          filled: drawn.width * drawn.height / (view.width * view.height),
          marks: svg.querySelectorAll('path, use').length, texts: svg.querySelectorAll('text').length,
          out: out.map(text => text.textContent)};
})
"""
CONTRAST = """
(() => {
  const parse = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 :
    ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const low = new Map();
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!own || ['style', 'title'].includes(element.tagName.toLowerCase())) continue;
    const style = getComputedStyle(element);
    const front = luminance(parse(element.closest('svg') ? style.fill : style.color));
    const back = luminance(behind(element));
    const contrast = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    const name = element.tagName + '.' + element.getAttribute('class') + ': ' + element.textContent.slice(0, 30);
    if (contrast < 4.5) low.set(name, contrast);
  }
  return [...low];
})()
"""
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def tab() -> Iterator[chromium.Page]:
    if not (name := chromium.executable()):
        pytest.skip("no Chromium: install it, or name it in the environment variable CHROMIUM")
    with chromium.browser(name) as tab:
        yield tab


def show(tab: chromium.Page, page: Path, width: int, scheme: str) -> None:
    """Load the page, with everything unfolded."""
    tab.show(page, width, scheme=scheme)
    tab.run("document.querySelectorAll('details').forEach(one => { one.open = true })")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 360])
def test_the_page_is_readable_in_a_browser(tab: chromium.Page, page: Path, width: int, scheme: str) -> None:
    show(tab, page, width, scheme)
    assert tab.run(OVERFLOW) <= 0
    assert tab.run(CONTRAST) == []
    charts: list[dict[str, Any]] = tab.run(CHARTS)
    assert len(charts) == 18
    for chart in charts:
        assert chart["marks"] > 10, chart
        assert chart["texts"] > 5, chart
        assert chart["filled"] > 0.8, chart
        assert min(chart["width"], chart["height"]) > 90, chart
        assert chart["out"] == [], "cut off"
    assert tab.console == []
    assert set(tab.requests) == {page.resolve().as_uri()}


def test_light_and_dark_are_two_pages(tab: chromium.Page, page: Path) -> None:
    colours = []
    for scheme in ("light", "dark"):
        tab.show(page, 900, scheme=scheme)
        colours.append(tab.run("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"]


def test_wide_content_scrolls_in_its_own_box(tab: chromium.Page, page: Path) -> None:
    show(tab, page, 360, "light")
    widest = tab.run(
        "Math.max(...[...document.querySelectorAll('.scroll')].map(box => box.scrollWidth - box.clientWidth))"
    )
    assert widest > 200
    assert tab.run("getComputedStyle(document.querySelector('.scroll')).overflowX") == "auto"


def test_a_chart_stands_alone(directory: Path, tmp_path: Path) -> None:
    """It is an SVG image that brings every colour it uses, for light and dark; a README shows it as a file."""
    path = tmp_path / "chart.svg"
    write_chart(directory, "patterns/threads/transfer", path)
    drawn = path.read_text(encoding="utf-8")
    root = ElementTree.fromstring(drawn)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert float(root.attrib["width"]) > float(root.attrib["height"]) > 50
    used, defined = set(re.findall(r"var\((--[\w-]+)\)", drawn)), set(re.findall(r"(--[\w-]+):", drawn))
    assert used
    assert used <= defined
    assert "prefers-color-scheme: dark" in drawn
    assert "with_session" in drawn


def test_a_chart_of_an_unknown_contest_is_refused_with_the_known_ones(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(LookupError, match=r"'patterns/threads/x' is not a contest of .* patterns/threads/transfer"):
        write_chart(directory, "patterns/threads/x", tmp_path / "chart.svg")
    assert not (tmp_path / "chart.svg").exists()
