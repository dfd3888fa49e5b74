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

    def __str__(self) -> str:
        return ", ".join((self.way, self.broker, self.database, self.pool, f"results in {self.results}"))


@dataclass
class Verdict:
    """What a storm has done."""

    setup: Setup
    seed: int
    kills: Counter[str] = field(default_factory=Counter)
    """Of processes that had a message in hand, by the point, or by what was struck at random."""
    idle_kills: int = 0
    flows: int = 0
    due: int = 0
    """Effects that are due."""
    twice: int = 0
    lost: int = 0
    lost_by_kombu: int = 0
    """Of flows with a message that no worker acknowledged, and that the broker has no more."""
    bodies_twice: int = 0
    settled: bool = False
    """The broker had no message any more when this was counted."""
    wrong_results: int = 0
    failures: int = 0
    again: bool = False
    """All was sent again with the same ids, after everything was killed."""
    twice_after: int = 0
    lost_after: int = 0
    deliveries: int = 0
    """How often a message came to a worker."""
    odd: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

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
    """Which messages were published, by flow, and which of them a worker has acknowledged."""

    def __init__(self) -> None:
        self.published: dict[str, set[str]] = {}
        self.acknowledged: set[str] = set()

    @classmethod
    def of(cls, said: Iterable[Sequence[str]]) -> "Messages":
        """Read them out of what the processes have said."""
        found = cls()
        for what, *words in said:
            if what == "acknowledges":
                found.acknowledged.add(words[0])
            elif what == "published":
                found.published.setdefault(words[1], set()).add(words[0])
        return found

    def gone(self, key: str) -> list[str]:
        """Return the messages of a flow that no worker has acknowledged."""
        return sorted(self.published.get(key, set()) - self.acknowledged)


def written(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as a row to be kept."""
    return {**asdict(verdict), "kills": dict(verdict.kills)}
