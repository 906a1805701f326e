"""Slow work on checkpoints, of which only the newest matters."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path


class Latest:
    """Has `work`, which must not raise, done on checkpoints, one at a time; of those that came meanwhile, the last."""

    def __init__(self, work: Callable[[Path], Awaitable[None]]) -> None:
        self._work, self._next = work, asyncio.Queue[Path](1)
        self._task = asyncio.create_task(self._run())

    def give(self, path: Path) -> None:
        """This is the newest now; returns at once."""
        if self._next.full():
            self._next.get_nowait()
        self._next.put_nowait(path)

    async def _run(self) -> None:
        while True:
            await self._work(await self._next.get())
