"""Does the driver let other greenlets run while it waits for the server? If not, comparing worker pools is void."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from .workloads import HubBlocked

SLEEP_S = 0.2
TICK_S = 0.01
FEWEST_TICKS = 3
"""Of 20. A blocked hub allows one, before or after; a busy machine eats some."""


def require_free_hub(connect: Callable[[], None], sleep_on_server: Callable[[float], None]) -> None:
    """Wait for the server, and count how often another greenlet (or thread, where nothing is patched) ran meanwhile.

    Args:
        connect: Sends any statement: connecting is not what is measured.
        sleep_on_server: Keeps the server busy for so many seconds.
    Raises:
        HubBlocked: It hardly ran.
    """
    connect()
    over = threading.Event()
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        while not over.is_set():
            time.sleep(TICK_S)
            ticks += 1

    thread = threading.Thread(target=tick, name="preflight", daemon=True)
    thread.start()
    try:
        sleep_on_server(SLEEP_S)
        seen = ticks
    finally:
        over.set()
        thread.join()
    if seen < FEWEST_TICKS:
        raise HubBlocked(
            f"While a query took {SLEEP_S * 1000:.0f} ms, another greenlet ran {seen} times instead of about "
            f"{SLEEP_S / TICK_S:.0f}: the driver blocks the hub, so that tasks run one after the other."
        )
