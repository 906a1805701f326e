"""A clock that stands still while this process is stopped, or gets no processor: others' silence is its own then.

Whoever waits by this clock reads it every BEAT seconds, or the wait itself would count as a stop.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic

BEAT = 0.05     # seconds between two readings
STOPPED = 0.25  # beyond that, which are no delay any more; and that are granted then, to read what has come meanwhile


class Clock:
    """One process's."""

    def __init__(self) -> None:
        self._last, self._missed = monotonic(), 0.0

    def now(self) -> float:
        """Seconds since some moment, less those for which the process was stopped."""
        time = monotonic()
        if time - self._last > BEAT + STOPPED:
            self._missed += time - self._last + STOPPED
        self._last = time
        return time - self._missed


now = Clock().now


@asynccontextmanager
async def timeout(seconds: float) -> AsyncIterator[None]:
    """asyncio.timeout by this clock."""
    loop, until = asyncio.get_running_loop(), now() + seconds
    timer: asyncio.TimerHandle | None = None

    async with asyncio.timeout(None) as limit:
        def look() -> None:
            nonlocal timer
            if (left := until - now()) > 0:
                timer = loop.call_later(min(left, BEAT), look)
            else:
                limit.reschedule(loop.time())
        look()
        try:
            yield
        finally:
            if timer:
                timer.cancel()
