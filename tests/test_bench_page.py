"""The page of a run: as text, and in a real browser."""

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
from support.bench_results import CHECKS, DEMO, Plan, facts_of, write_demo, write_results

from celery_alchemy.loadtests.bench.store import Store
from celery_alchemy.loadtests.reports import write_chart, write_report
from celery_alchemy.loadtests.reports.charts import COLOURS
from celery_alchemy.loadtests.tasks.patterns import OURS

PLAN = Plan(
    pools=("prefork", "threads", "gevent", "solo"),
    workloads=("transfer", "slow_io"),
    baselines=("recipe", "with_session", "null_pool", "process_init"),
)
SPEED_WORDS = ("faster", "slower", "cheaper", "dearer")
HOSTILE = "<script>alert('x')</script> & \"marks\""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_results(tmp_path_factory.mktemp("results"), PLAN)


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


def report(directory: Path) -> Path:
    write_report(Console(file=StringIO(), width=110), directory)
    return directory / "index.html"


@pytest.fixture(scope="module")
def page(directory: Path) -> Path:
    return report(directory)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report(write_demo(tmp_path_factory.mktemp("demo")))


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
    # Forest plots of worker pools over all workloads, and of workloads over all worker pools; open loads.
    assert len(charts) == 4 + 2 + 2
    assert all(found["role"] == "img" and len(found["aria-label"] or "") > 40 for found in charts)
    text = page.read_text()
    assert re.findall(r"(?:fill|stroke): *#[0-9a-f]{3,6}", text) == []
    used, defined = (
        set(re.findall(r"var\((--[a-z0-9-]+)\)", text)),
        set(re.findall(r"(--[a-z0-9-]+):", COLOURS.read_text())),
    )
    assert used - {"--width"} <= defined


def test_what_came_from_elsewhere_is_escaped(tmp_path: Path) -> None:
    """The machine, the command, a workload's name, what was found and the worker's log: all of it somebody else's."""
    plan = replace(
        PLAN, pools=("threads",), workloads=(HOSTILE, "transfer"), broken={("threads", "recipe"): {CHECKS[0]: HOSTILE}},
        batches=2, sweeps=1, version=HOSTILE,
    )  # fmt: skip
    page = report(write_results(tmp_path, plan))
    text = page.read_text()
    assert "An EPYC &lt;7B13&gt;" in text
    assert "&lt;this Session&#39;s transaction&gt;" in text
    assert text.count("&lt;script&gt;") > 10
    assert not {tag for tag, _ in read(page).tags} & {"script"}
    assert "<script" not in (tmp_path / "summary.md").read_text()


def test_a_broken_arm_is_named_with_its_breach_and_without_speed(page: Path) -> None:
    rows = re.findall(r'<tr><th scope="row">recipe</th>(.*?)</tr>', page.read_text(), re.DOTALL)
    broken = [row for row in rows if '<span class="broken">broken</span>' in row]
    assert len(broken) == 4, "in the tables of its contests: two worker pools, two workloads"
    for row in broken:
        breach, *rest = re.findall(r"<td>(.*?)</td>", row, re.DOTALL)
        assert re.search(r"<small>every task .*: no</small>", breach)
        assert set(rest) == {"-"}


SECTIONS = ("choose", "patterns", "pools", "open-load", "wrong", "phases", "round-trips", "noise", "facts")


def test_the_sections_come_in_their_order(page: Path) -> None:
    assert re.findall(r'<section id="([a-z-]+)"', page.read_text()) == list(SECTIONS)


def test_every_ratio_says_how_many_workers_and_rounds_it_comes_from(page: Path) -> None:
    ratios = re.findall(r"\d\.\d\d \[\d\.\d+, \d\.\d+\][^<]*(?:</span>)?<small>([^<]*)</small>", page.read_text())
    assert len(ratios) > 100
    assert all(re.search(r"n = \d+ workers, \d+ rounds$", note) for note in ratios)


@pytest.mark.parametrize(
    ("plan", "without", "said"),
    [
        (replace(PLAN, sweep=False), {"open-load"}, "Worker pool: "),
        (
            replace(PLAN, pools=("gevent",), concurrencies=(), sweep=False),
            {"open-load", "pools"},
            "Strategy: undecided under gevent.",
        ),
        (
            replace(
                PLAN,
                pools=("threads",),
                broken={("threads", name): {CHECKS[0]: "1: a"} for name in (OURS, *PLAN.baselines)},
            ),
            {"phases", "noise"},
            "the reference is broken: every task was answered: no",
        ),
        (replace(PLAN, rounds=0, sweep=False), {"open-load", "choose", "phases", "noise"}, "nothing is recommended"),
        (replace(PLAN, batches=1, rounds=3, sweep=False), {"open-load"}, "too few workers (1) for a 95 % interval"),
    ],
    ids=["no sweep", "one worker pool", "everything broken", "checked only", "too short"],
)
def test_what_is_missing_leaves_no_empty_section(tmp_path: Path, plan: Plan, without: set[str], said: str) -> None:
    page = report(
        write_results(tmp_path, replace(plan, workloads=("transfer",), batches=min(plan.batches, 2), sweeps=1))
    )
    text = page.read_text()
    assert said in text
    read(page)
    assert not {name for name in without if f'<section id="{name}"' in text}
    for name, content in re.findall(r'<section id="([a-z-]+)"[^>]*><h2>[^<]*</h2>(.*?)</section>', text, re.DOTALL):
        assert "<table" in content or "<svg" in content, name
    assert not re.search(rf'class="(good|bad)">[^<]*({"|".join(SPEED_WORDS)})', text), "two workers prove nothing"


def test_a_run_that_was_stopped_early_is_a_page_too(tmp_path: Path) -> None:
    Store(tmp_path, "matrix", facts_of(PLAN))
    assert "Nothing was compared: no contest was run." in report(tmp_path).read_text()


# The demo


def test_the_demo_is_one_picture_one_table_and_one_recommendation(demo: Path) -> None:
    text = demo.read_text()
    (chart,) = [found for tag, found in read(demo).tags if tag == "svg"]
    label = chart["aria-label"] or ""
    for pool, (right, wrong, unanswered, _) in DEMO.items():
        assert f"{pool}, recipe: {right} of {right + wrong + unanswered} right" in label
        assert f"{pool}, celery-alchemy: 200 of 200 right, CPU" in label
    assert re.findall(r'<section id="([a-z-]+)"', text) == ["demo", "wrong", "facts"]
    short = re.findall(r'<div class="short">(.*?)</div>', text, re.DOTALL)[0]
    assert re.findall("<p>(.*?)</p>", short) == [
        "Under threads the recipe got 20 of 200 orders right; celery-alchemy 200 of 200.",
        "In all the recipe got 400 of 1,000 orders right; celery-alchemy 1,000 of 1,000, "
        "at 0.96 times the worker CPU per order.",
        "Choose: celery-alchemy, right under 5 of 5 worker pools.",
    ]


def test_the_demo_in_the_terminal_is_one_table_that_fits(tmp_path: Path) -> None:
    out = StringIO()
    write_report(Console(file=out, width=80), write_demo(tmp_path))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert re.search(r"threads, recipe +20 of 200 +163 +17 +12 +4\.76 +4\.97", text)
    assert re.search(r"threads, celery-alchemy +200 of 200 +0 +0 +0 +124 +4\.50", text)
    assert "Choose: celery-alchemy, right under 5 of 5 worker pools." in text


def test_restarts_of_a_demo_are_counted_together_and_their_cpu_has_an_interval(tmp_path: Path) -> None:
    """The recipe lost too many orders under threads for its CPU to be compared; it used 0.91 s elsewhere."""
    demo = {"solo": (171, 29, 0, 1), "prefork": (200, 0, 0, 0), "threads": (20, 60, 120, 12)}
    directory = write_demo(tmp_path, demo, cpu_s=(0.819, 1.001, 0.91))
    text = report(directory).read_text()
    assert "Under threads the recipe got 60 of 600 orders right; celery-alchemy 600 of 600." in text
    at, low, high = re.findall(r"at ([\d.]+) \[([\d.]+), ([\d.]+)\] times the worker CPU per order", text)[0]
    assert at == "1.00"  # the geometric mean of 0.9, 1.1 and 1
    assert 0.88 < float(low) < 1 < float(high) < 1.12


def test_where_ours_is_wrong_the_demo_does_not_recommend_it(tmp_path: Path) -> None:
    """A pattern that is right more often is what the page says to choose, whoever wrote it."""
    directory = write_demo(tmp_path, {"solo": (200, 0, 0, 0)}, ours=(199, 1))
    assert "Choose: recipe, right under 1 of 1 worker pools." in report(directory).read_text()


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
@pytest.mark.parametrize("width", [1400, 420, 360])
def test_the_page_is_readable_in_a_browser(tab: chromium.Page, page: Path, width: int, scheme: str) -> None:
    show(tab, page, width, scheme)
    assert tab.run(OVERFLOW) <= 0
    assert tab.run(CONTRAST) == []
    charts: list[dict[str, Any]] = tab.run(CHARTS)
    assert len(charts) == 8
    for chart in charts:
        assert chart["marks"] > 10, chart
        assert chart["texts"] > 5, chart
        assert chart["filled"] > 0.8, chart
        assert min(chart["width"], chart["height"]) > 90, chart
        assert chart["out"] == [], "cut off"
    assert tab.console == []
    assert set(tab.requests) == {page.resolve().as_uri()}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 420])
def test_nothing_of_the_demo_is_cut(tab: chromium.Page, demo: Path, width: int, scheme: str) -> None:
    tab.show(demo, width, scheme=scheme)
    assert tab.run(OVERFLOW) <= 0
    hidden = (
        "[...document.querySelectorAll('section:first-of-type .scroll')].map(box => box.scrollWidth - box.clientWidth)"
    )
    assert tab.run(hidden) == [0, 0], "picture and table need no scrolling"
    assert tab.run(CONTRAST) == []
    (chart,) = tab.run(CHARTS)
    assert chart["out"] == []
    assert chart["texts"] > 20
    smallest = "Math.min(...[...document.querySelectorAll('svg text')].map(one => one.getBoundingClientRect().height))"
    assert tab.run(smallest) > 10, "readable"
    assert tab.console == []


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


@pytest.mark.parametrize("name", ["patterns/threads/transfer", "patterns/threads"])
def test_a_chart_stands_alone(directory: Path, tmp_path: Path, name: str) -> None:
    """It is an SVG image that brings every colour it uses, for light and dark; a README shows it as a file."""
    path = tmp_path / "chart.svg"
    write_chart(directory, name, path)
    drawn = path.read_text(encoding="utf-8")
    root = ElementTree.fromstring(drawn)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert float(root.attrib["width"]) > float(root.attrib["height"]) > 50
    used, defined = set(re.findall(r"var\((--[\w-]+)\)", drawn)), set(re.findall(r"(--[\w-]+):", drawn))
    assert used
    assert used <= defined
    assert "prefers-color-scheme: dark" in drawn
    assert "with_session" in drawn


def test_the_picture_of_a_demo_stands_alone(tmp_path: Path) -> None:
    """What a README shows: how many orders came out right, by worker pool and by whose Session."""
    write_chart(write_demo(tmp_path), "demo", tmp_path / "chart.svg")
    drawn = (tmp_path / "chart.svg").read_text(encoding="utf-8")
    assert ElementTree.fromstring(drawn).tag == "{http://www.w3.org/2000/svg}svg"
    for pool, (right, *_) in DEMO.items():
        assert f"{pool}, recipe: {right} of 200 right" in drawn


def test_a_picture_of_a_demo_takes_a_demo(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="demo has nothing to draw"):
        write_chart(directory, "demo", tmp_path / "chart.svg")


def test_a_chart_of_an_unknown_contest_is_refused_with_the_known_ones(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(LookupError, match=r"'patterns/threads/x' is not a contest of .* patterns/threads/transfer"):
        write_chart(directory, "patterns/threads/x", tmp_path / "chart.svg")
    assert not (tmp_path / "chart.svg").exists()
