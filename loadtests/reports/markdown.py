"""A short table for a README or the summary of a CI job."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from .reading import summarise
from .recommendation import Recommendation, recommend
from .standings import Standing, Tally
from .statistics import METRICS
from .summary import Summary
from .together import PoolStanding, labels_of
from .wording import factor, listed, percent, pool_ratio

MARKDOWN_FILE = "summary.md"


def write_markdown(directory: Path) -> Path:
    """Write `summary.md` into a result directory, and return its path."""
    summary = summarise(directory)
    path = directory / MARKDOWN_FILE
    path.write_text(markdown(summary, recommend(summary)), encoding="utf-8")
    return path


def markdown(summary: Summary, found: Recommendation) -> str:
    """Return the recommendation in short, the patterns, and what to use for which workload."""
    parts = ["\n".join(f"- {_escape(line)}" for line in found.in_short)]
    if found.standings and summary.measured:
        parts.append(_standings(found.standings))
    if found.by_pool:
        parts.append(_by_pool(found.by_pool))
    elif found.standings and not summary.measured:
        parts.append(_verdicts(found.standings))
    if choices := [advice for advice in found.workloads if advice.advice]:
        topics = list(dict.fromkeys(one.topic for advice in choices for one in advice.advice))
        rows = [
            (
                f"`{advice.workload}`",
                *(next((one.choice for one in advice.advice if one.topic == topic), "-") for topic in topics),
            )
            for advice in choices
        ]
        parts.append(_table(("workload", *topics), rows))
    parts.append(_origin(summary))
    return "\n\n".join(parts) + "\n"


def _standings(standings: Sequence[Standing]) -> str:
    columns = ("pattern", "broken", "goodput, ratio", "goodput is", "worker CPU per task, ratio", "worker CPU is")
    return _table(
        columns,
        [
            (
                standing.pattern,
                _broken(standing),
                _mean(standing.tallies["goodput"]),
                _said(standing.tallies["goodput"], "faster", "slower"),
                _mean(standing.tallies["cpu"]),
                _said(standing.tallies["cpu"], "cheaper", "dearer"),
            )
            for standing in standings
        ],
    )


def _by_pool(standings: Sequence[PoolStanding]) -> str:
    pools = list(dict.fromkeys(one.pool for one in standings))
    cells = {(one.label, one.pool): one for one in standings}
    tables = []
    for metric in dict.fromkeys(name for one in standings for name in one.ratios):
        rows = [
            (label, *(_shown(cells.get((label, pool)), metric) for pool in pools)) for label in labels_of(standings)
        ]
        tables.append(
            f"{_upper(METRICS[metric].label)}, ratio to celery-alchemy with auto over all workloads of a worker "
            f"pool: median of the batches [95 % interval]; bold where a difference is shown\n\n"
            + _table(("pattern", *pools), rows)
        )
    return "\n\n".join(tables)


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _shown(standing: PoolStanding | None, metric: str) -> str:
    found = standing.ratios.get(metric) if standing else None
    text = pool_ratio(found)
    return f"**{text}**" if found and found.shown else text


def _verdicts(standings: Sequence[Standing]) -> str:
    return _table(("pattern", "broken"), [(standing.pattern, _broken(standing)) for standing in standings])


def _broken(standing: Standing) -> str:
    under = f" ({listed(standing.broken_under)})" if standing.broken else ""
    blocked = f", driver blocks in {standing.blocked}" if standing.blocked else ""
    return f"{standing.broken} of {standing.cells}{under}{blocked}"


def _mean(tally: Tally) -> str:
    return f"{factor(tally.middle)} ({factor(tally.least)} to {factor(tally.most)})" if tally.contests else "-"


def _said(tally: Tally, better: str, worse: str) -> str:
    said = [f"{n} {word}" for n, word in ((tally.better, better), (tally.worse, worse)) if n]
    said += [f"{tally.neither} no difference shown"] if tally.neither else []
    return ", ".join(said) or "-"


def _origin(summary: Summary) -> str:
    facts = summary.facts
    floors = [contest.floors["goodput"] for contest in summary.contests if "goodput" in contest.floors]
    noise = f" A/A floor of goodput {percent(min(floors))} to {percent(max(floors))}." if floors else ""
    batches = max((contest.batches for contest in summary.contests), default=0)
    rounds = max((contest.rounds for contest in summary.contests), default=0)
    machine = ", ".join(f"{name} {value}" for name, value in facts.machine.items())
    versions = ", ".join(f"{name} {value}" for name, value in facts.versions.items())
    return _escape(
        f"Ratios to celery-alchemy with auto: geometric mean (range) of the medians of each contest of {rounds} "
        f"rounds in "
        f"{batches} batches.{noise} {machine}; {versions}; {', '.join(facts.services)}."
    ) + "".join(f"\n\n    {line}" for line in facts.command.splitlines()[:1])  # fmt: skip


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_escape(cell) for cell in line)} |" for line in lines)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
