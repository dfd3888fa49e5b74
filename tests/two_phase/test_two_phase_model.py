"""Every interleaving of a worker over three databases, two resolvers and the death of each: all agree at the end.

A model of the protocol that `several.two_phase` and `several.in_doubt` follow; test_in_doubt.py has real servers.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

OTHERS = 2
OVER = ("committed", "rolled back")


class State(NamedTuple):
    at: Any = 0
    """The number of the worker's next step, or what it does after an error: undo, leave, or nothing (over)."""
    done: tuple[str, ...] = ("active",) * (1 + OTHERS)
    """What each server says, that of the decider first."""
    connected: tuple[bool, ...] = (True,) * (1 + OTHERS)
    resolvers: tuple[Any, ...] = (None, None)
    """What each has seen prepared, and what it has decided: `(which, None)`, `(which, commits)`."""

    def ends(self, which: int, how: str) -> "State":
        return self._replace(done=(*self.done[:which], how, *self.done[which + 1 :]))

    def loses(self, which: int) -> "State":
        """The connection is lost; the server rolls back what is not prepared."""
        lost = self._replace(connected=(*self.connected[:which], False, *self.connected[which + 1 :]))
        return lost.ends(which, "rolled back") if self.done[which] == "active" else lost

    def dies(self, at: str = "over") -> "State":
        state = self._replace(at=at)
        for which in range(1 + OTHERS):
            state = state.loses(which)
        return state


Decide = Callable[[State, int], bool | None]


def postgresql_says(state: State, which: int) -> bool | None:
    if which == 0:
        return False
    return {"committed": True, "rolled back": False}.get(state.done[0])


def mysql_says(state: State, which: int) -> bool | None:
    if which == 0:
        return True if "prepared" not in state.done[1:] else None
    if state.done[0] == "active":
        return None
    return state.done[0] == "prepared"


def worker(state: State, postgresql: bool) -> Iterator[State]:
    others = range(1, 1 + OTHERS)
    order = [0, *others] if postgresql else [*others, 0]
    steps = [("prepare", which) for which in order] + [("commit", which) for which in order]
    if state.at == "over":
        return
    yield state.dies()
    if state.at == "leave":
        return
    yield from (state.loses(which) for which in range(1 + OTHERS) if state.connected[which])
    if state.at == "undo":
        for which in range(1 + OTHERS):
            if state.connected[which] and state.done[which] not in OVER:
                yield state.ends(which, "rolled back")
        if not any(up and how not in OVER for up, how in zip(state.connected, state.done, strict=True)):
            yield state.dies()
        return
    what, which = steps[state.at]
    after = state._replace(at=state.at + 1 if state.at + 1 < len(steps) else "over")
    unknown = state._replace(at="leave" if what == "commit" or (which == 0 and not postgresql) else "undo")
    if not state.connected[which]:
        yield unknown
    elif what == "prepare":
        yield after.ends(which, "prepared")
        yield state._replace(at="undo").ends(which, "rolled back")  # refused
        yield unknown.ends(which, "prepared").loses(which)
        yield unknown.loses(which)
    elif state.done[which] == "prepared":
        yield after.ends(which, "committed")
        yield unknown.ends(which, "committed").loses(which)
        yield unknown.loses(which)
    elif which == 0 and postgresql and state.done[0] == "rolled back":
        yield state._replace(at="undo")
    else:
        assert state.done[which] == "committed", "the worker takes it for committed, and tells the truth"
        yield after


def resolver(state: State, number: int, decide: Decide, held: bool) -> Iterator[State]:
    def now(seen: Any, state: State = state) -> State:
        return state._replace(resolvers=(*state.resolvers[:number], seen, *state.resolvers[number + 1 :]))

    seen = state.resolvers[number]
    if seen is None:
        yield from (now((which, None)) for which, how in enumerate(state.done) if how == "prepared")
        return
    yield now(None)  # it dies
    which, commits = seen
    if commits is None:
        commits = decide(state, which)
        yield now(None if commits is None else (which, commits))
    elif state.done[which] == "prepared" and not (held and state.connected[which]):
        yield now(None, state.ends(which, "committed" if commits else "rolled back"))


@pytest.mark.parametrize(
    ("decide", "postgresql", "held"),
    [
        pytest.param(postgresql_says, True, False, id="postgresql"),
        pytest.param(mysql_says, False, True, id="mariadb"),
        pytest.param(mysql_says, False, False, id="mysql-that-detaches-what-is-prepared"),
    ],
)
def test_all_agree_after_every_interleaving(decide: Decide, postgresql: bool, held: bool) -> None:
    found, waiting, ended = {State()}, [State()], set()
    while waiting:
        state = waiting.pop()
        following = list(worker(state, postgresql))
        for number in range(2):
            following += resolver(state, number, decide, held)
        for new in following:
            if new not in found:
                found.add(new)
                waiting.append(new)
        if set(state.done) <= set(OVER):
            ended.add(state.done)
        elif state.at == "over" and state.resolvers == (None, None):
            assert following, "somebody can end what is prepared"
    assert len(found) > 1000
    assert ended == {("committed",) * (1 + OTHERS), ("rolled back",) * (1 + OTHERS)}
