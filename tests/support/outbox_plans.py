"""What each transaction of an outbox storm does, made from its number: for those who do it and those who check it."""

import random
import uuid
from dataclasses import dataclass

NAMESPACE = uuid.UUID("6f1d3b1e-0c51-4d4c-8a5e-0f9a4a1f6f0b")
WAYS = (
    "unit of work",
    "unit of work, commit()",
    "Session",
    "Session.begin() block",
    "unit of work, begin() afterwards",
)
ENDINGS = ("commit",) * 8 + ("raise", "rollback")
KINDS = ("plain",) * 4 + ("own id",) * 2 + ("savepoint", "undone savepoint", "mapper event")
MOST_PARTS = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """One transaction."""

    number: int
    way: str
    """How the transaction is opened and committed."""
    ending: str
    parts: tuple[str, ...]
    """For each message how it is registered, in this order; those of mapper events come last, with the flush of the
    COMMIT."""

    @property
    def arriving(self) -> list[int]:
        """The messages that arrive, by their places, in their order, once the transaction is committed."""
        return [place for place, kind in enumerate(self.parts) if kind != "undone savepoint"]


def plan(seed: int, number: int) -> Plan:
    """Return what the transaction of this number does."""
    chance = random.Random(f"{seed}-{number}")
    parts = [chance.choice(KINDS) for _ in range(chance.randint(0, MOST_PARTS))]
    parts.sort(key=lambda kind: kind == "mapper event")
    way = chance.choice(WAYS)
    if way == "unit of work, begin() afterwards":  # a savepoint would begin the transaction
        parts = ["plain" if "savepoint" in kind else kind for kind in parts]
    return Plan(number, way, chance.choice(ENDINGS), tuple(parts))


def own_id(seed: int, number: int, place: int) -> str:
    """Return the id that the sender gives a message of its own accord."""
    return str(uuid.uuid5(NAMESPACE, f"{seed}-{number}-{place}"))
