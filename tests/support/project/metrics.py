"""An observer that tells the test what it was told."""

from typing import Any

from support.project import tools


class Telling:
    """Under the key of the worker."""

    def unit_ended(self, unit: Any, duration_s: float) -> None:
        name = unit.label.partition("[")[0]
        told = {"task": name, "outcome": unit.outcome, "statements": unit.activity.statements, "s": duration_s}
        tools.say(f"metrics-{tools.config['worker']}", told)

    def waited(self, database: str, wait_s: float) -> None:
        tools.say(f"metrics-{tools.config['worker']}", {"database": database, "s": wait_s})

    def leaked(self, count: int) -> None:
        tools.say(f"metrics-{tools.config['worker']}", {"leaks": count})
        raise ZeroDivisionError("an observer that fails")


observer = Telling()
