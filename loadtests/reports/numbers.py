"""The numbers in README and docs, computed from what is committed below loadtests/results.

`<!-- = goodput RUN CONTEST ARM -->...<!-- / -->`: between the marks stands what `KNOWN` makes of the first.
`python -m celery_alchemy.loadtests.reports.numbers FILE ...` writes it, and fails where something else stood there.
"""

import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

from ..faults import soak
from ..overhead.baseline import instructions
from . import storms
from .summary import Summary, summarise
from .tables import by_pool, demo, demo_in_short, open_loads, ratio_cell
from .terminal import markdown_table
from .wording import number

RESULTS = Path("loadtests/results")
MARKED = re.compile(r"(<!-- = ([^>]*?) -->).*?(<!-- / -->)", re.DOTALL)
read: Callable[[str], Summary] = cache(lambda run: summarise(RESULTS / run))
every: Callable[[str], list[Summary]] = lambda runs: [read(run) for run in runs.split("+")]  # noqa: E731


KNOWN: dict[str, Callable[..., str]] = {
    "standings": lambda runs, what, *pools: f"\n{markdown_table(by_pool(every(runs), what, pools))}\n",
    "tasks": lambda runs: (
        f"{sum(c.tasks for s in every(runs) for of in s.batches.values() for b in of for c in b.cells):,}"
    ),
    "demo": lambda run: f"\n{markdown_table(demo(read(run))[0])}\n",
    "demo-in-short": lambda run: " ".join(demo_in_short(read(run))),
    "goodput": lambda run, name, arm: number(read(run).contest(name).row(arm).speed.goodput_per_s),  # type: ignore[union-attr]
    "open-loads": lambda run: f"\n{markdown_table(open_loads(read(run))[0])}\n",
    "round-trips": lambda run, workload, pattern: f"{read(run).facts.round_trips[workload][pattern]:g}",
    "instructions": lambda *of: f"{instructions(*of):,.0f}",
    "times": lambda *of: f"{instructions(*of[:3]) / instructions(*of[3:]):.2f}",
    "ratio": lambda run, name, arm, metric: ratio_cell(read(run).contest(name).row(arm).ratios[metric]).text,  # type: ignore[union-attr]
    "soak": lambda run: f"\n{markdown_table(soak.kept(RESULTS / run))}\n",
    "storms": lambda run, what: storms.said(RESULTS / run, what),
}


def main(*names: str) -> int:
    differ = []
    for path in map(Path, names):
        text = path.read_text()
        made = MARKED.sub(lambda found: found[1] + KNOWN[found[2].split()[0]](*found[2].split()[1:]) + found[3], text)
        pairs = zip(MARKED.finditer(text), MARKED.finditer(made), strict=True)
        differ += [f"{path} has:\n{old[0]}\nthe results say:\n{new[0]}" for old, new in pairs if old[0] != new[0]]
        path.write_text(made)
    print(*differ, sep="\n")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
