"""In the place of click_repl, which `celery amqp` alone uses: it would bring prompt_toolkit and Pygments."""

from typing import Any


def register_repl(*_: Any, **__: Any) -> None:
    """Leave the command `celery amqp repl` out."""
