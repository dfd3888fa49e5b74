"""What became of the flows of a storm: see `support.once_storm`."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from support.once_kills import EXPECTED

LAST = {"chain": "c", "chord": "body", "replace": "r+", "retry": "t", "follow": "f"}
"""What the last task of each kind of flow returns."""


@dataclass(frozen=True)
class Setup:
    """What a storm goes over."""

    way: str
    broker: str
    database: str
    pool: str
    results: str = "redis"
    tasks: str = "def"
    """Or "async def"."""
    begins: str = "first"
    """PostgreSQL: BEGIN and the row of the task go "along" with the first statement, or "first", by themselves."""

    def __str__(self) -> str:
        more = ["BEGIN along"] if self.begins == "along" else []
        places = (self.way, self.broker, self.database, self.pool, f"results in {self.results}", self.tasks)
        return ", ".join((*places, *more))


@dataclass
class Verdict:
    """What a storm has done."""

    setup: Setup
    seed: int
    kills: Counter[str] = field(default_factory=Counter)
    """Of processes that had a message in hand, by the point, or by what was struck at random."""
    idle_kills: int = 0
    flows: int = 0
    flows_by_outbox: int = 0
    """Of them: whose first messages went through the outbox too."""
    due: int = 0
    """Effects that are due."""
    twice: int = 0
    lost: int = 0
    lost_by_kombu: int = 0
    """Of flows with a message that was sent without the outbox, that no worker acknowledged, and that the broker has no
    more."""
    bodies_twice: int = 0
    settled: bool = False
    """The broker had no message any more when this was counted."""
    wrong_results: int = 0
    results_lost_by_kombu: int = 0
    """Results that are wrong, of flows with such a message."""
    failures: int = 0
    set_aside: int = 0
    """Messages that the outbox has given up."""
    again: bool = False
    """All was sent again with the same ids, after everything was killed."""
    twice_after: int = 0
    lost_after: int = 0
    deliveries: int = 0
    """How often a message came to a worker."""
    odd: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of each."""

    def judge(self, key: str, kind: str, done: Iterable[str], gone: Sequence[str], result: tuple[str, Any]) -> None:
        """Count what a flow has done.

        Args:
            done: Its effects.
            gone: Its messages that no worker has acknowledged.
            result: State and result of its last task.
        """
        due, found, wrong = Counter(EXPECTED[kind]), Counter(done), ""
        self.flows += 1
        self.due += due.total()
        more, missing = found - due, due - found
        self.twice += more.total()
        self.bodies_twice += sum(number for note, number in more.items() if note.endswith(">body"))
        if missing and gone:
            self.lost_by_kombu += missing.total()
        else:
            self.lost += missing.total()
        if not missing and result != ("SUCCESS", LAST[kind]):
            wrong = f"{result[0]} {result[1]!r}"
            if gone:
                self.results_lost_by_kombu += 1
            else:
                self.wrong_results += 1
        if more or missing or wrong:
            self.odd[key] = {
                "kind": kind, "twice": sorted(more.elements()), "lost": sorted(missing.elements()), "wrong": wrong,
                "never acknowledged": gone,
            }  # fmt: skip

    def judge_again(self, key: str, kind: str, done: Iterable[str]) -> None:
        """Count what a flow has done after it was sent once more."""
        due, found = Counter(EXPECTED[kind]), Counter(done)
        self.twice_after += (found - due).total()
        self.lost_after += (due - found).total()
        if found != due:
            self.odd.setdefault(key, {"kind": kind})["after"] = sorted(done)


class Messages:
    """Which messages have been sent without an outbox, by flow, and which of all a worker has acknowledged."""

    def __init__(self) -> None:
        self.published: dict[str, set[str]] = {}
        self.stored: dict[str, set[str]] = {}
        """Those of the outbox."""
        self.acknowledged: set[str] = set()
        self.rejected = 0

    def note(self, what: str, words: Sequence[str]) -> None:
        """Take note of what a process has said."""
        if what == "acknowledges":
            self.acknowledged.add(words[0])
        elif what in {"published", "stored"}:
            (self.published if what == "published" else self.stored).setdefault(words[1], set()).add(words[0])
        elif what == "rejected":
            self.rejected += 1

    def gone(self, key: str) -> list[str]:
        """Return the messages of a flow that the broker alone had, and that no worker has acknowledged."""
        return sorted(self.published.get(key, set()) - self.acknowledged)

    def gone_of_outbox(self, key: str) -> list[str]:
        """Return the messages of a flow that the outbox had, too, and that no worker has acknowledged."""
        return sorted(self.stored.get(key, set()) - self.acknowledged)


def written(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as a row to be kept."""
    return {**asdict(verdict), "kills": dict(verdict.kills)}
