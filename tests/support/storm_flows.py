"""The flows of tasks that a storm sends: see `support.once_storm`."""

import random
import time
import uuid
from collections.abc import Iterable
from typing import Any

from celery import chain, chord, signals
from sqlalchemy import text
from sqlalchemy.engine import Engine

from support.once_kills import EXPECTED
from support.storm_verdict import Messages, Setup, Verdict

LONG_S = 1.5
"""Longer than the visibility timeout."""
STALLED_S = 30.0
"""A flow that has not come to its end after that is waited for at the end of the storm."""


class Flows:
    """What was sent, and what of it is done.

    Args:
        module: `scripts/storm_app.py`, as the director's.
    """

    def __init__(self, setup: Setup, module: Any, engine: Engine, chance: random.Random) -> None:
        self._module, self._app, self._engine, self._chance = module, module.app, engine, chance
        self._ours = setup.way.startswith("ours")
        self.keys: dict[str, tuple[str, str]] = {}
        self.by_outbox: set[str] = set()
        self._messages: dict[str, list[tuple[Any, Any, str]]] = {}
        self._sends = ""
        self.open: dict[str, float] = {}
        signals.after_task_publish.connect(self._published)

    def close(self) -> None:
        signals.after_task_publish.disconnect(self._published)

    def _published(self, headers: Any = None, body: Any = None, routing_key: str = "", **_: Any) -> None:
        """Keep what the director has sent for a flow; what it has sent for the outbox of the workers is not that."""
        if self._sends:
            self._messages.setdefault(self._sends, []).append((headers, body, routing_key))

    # -- sending -----------------------------------------------------------------------------------------------------

    def send(self) -> None:
        """Send one more flow, of a random kind; every other one by way of the outbox, where there is one."""
        kind, key = self._chance.choice(list(EXPECTED)), uuid.uuid4().hex
        canvas = self._canvas(kind, key)
        self._sends = key
        try:
            if self._ours and self._chance.random() < 0.5:
                self.by_outbox.add(key)
                with self._module.db.unit_of_work():
                    result = self._module.db.delay_on_commit(canvas)
            else:
                self._module.sends_directly = True
                result = canvas.apply_async()
        finally:
            self._sends, self._module.sends_directly = "", False
        self.keys[key] = (kind, result.id)
        self.open[key] = time.monotonic()

    def _canvas(self, kind: str, key: str) -> Any:
        step = self._module.step
        link = step.s(key, "link")
        if kind == "chain":
            first = LONG_S if self._chance.random() < 0.1 else self._pause_s()
            return chain(
                step.s(None, key, "a", first), step.s(key, "b", self._pause_s()), step.s(key, "c").set(link=[link])
            )
        if kind == "chord":
            members = [step.s(None, key, f"m{number}", self._pause_s()) for number in range(3)]
            return chord(members, step.s(key, "body"))
        name, note = {"replace": ("replaced", "r"), "retry": ("retried", "t"), "follow": ("follows", "f")}[kind]
        canvas = self._app.tasks[name].s(None, key, note, self._pause_s()).set(task_id=str(uuid.uuid4()))
        return canvas if kind == "follow" else canvas.set(link=[link])

    def _pause_s(self) -> float:
        return self._chance.choice([0.0, 0.0, self._chance.uniform(0, 0.1)])

    def send_again(self) -> None:
        """Send all messages once more, with the same ids."""
        with self._app.amqp.producer_pool.acquire() as producer:
            for headers, body, routing_key in [one for kept in self._messages.values() for one in kept]:
                producer.publish(
                    body, routing_key=routing_key, headers=headers, correlation_id=headers["id"], serializer="json"
                )

    # -- looking -----------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """See which flows are done."""
        if not self.open:
            return
        found, now = self.traces(self.open), time.monotonic()
        for key, since in list(self.open.items()):
            if set(EXPECTED[self.keys[key][0]]) <= set(found.get(key, ())) or now - since > STALLED_S:
                del self.open[key]

    def are_done(self) -> bool:
        """Tell whether nothing is missing of any flow."""
        found = self.traces(self.keys)
        return all(set(EXPECTED[kind]) <= set(found.get(key, ())) for key, (kind, _) in self.keys.items())

    def traces(self, keys: Iterable[str]) -> dict[str, list[str]]:
        """Return the traces of each of these flows."""
        known, found = set(keys), dict[str, list[str]]()
        where = ""
        if len(known) < 200:
            names = ", ".join(f"'{key}'" for key in known)
            where = f" WHERE key_ IN ({names})" if names else ""
        with self._engine.connect() as connection:
            for key, note in connection.execute(text(f"SELECT key_, note FROM effects{where}")):
                if key in known:
                    found.setdefault(key, []).append(note)
        return found

    def judge(self, verdict: Verdict, messages: Messages) -> None:
        """Count what the flows have done."""
        found = self.traces(self.keys)
        verdict.flows_by_outbox = len(self.by_outbox)
        for key, (kind, task_id) in self.keys.items():
            result = self._app.AsyncResult(task_id)
            verdict.judge(key, kind, found.get(key, ()), messages.gone(key), (result.state, result.result))
            if key in verdict.odd:
                verdict.odd[key] |= {"id": task_id, "by outbox": key in self.by_outbox}
                verdict.odd[key] |= {"the outbox had": messages.gone_of_outbox(key)}

    def judge_again(self, verdict: Verdict) -> None:
        """Count once more, after everything was sent again."""
        found = self.traces(self.keys)
        for key, (kind, _) in self.keys.items():
            verdict.judge_again(key, kind, found.get(key, ()))
