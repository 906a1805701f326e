"""Keeps one worker running: starts it, follows it, restarts it, ends it. Never imports torch."""

import asyncio
import signal
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from averaging.backoff import Backoff
from averaging.runtime import remove_libp2p_sockets, scratch_dir
from peer.events import read_events
from peer.job import Job
from peer.process import Worker, start_worker
from peer.status import fold, forget_worker
from proto.peer_pb2 import PeerStatus, WorkerEvent

EXIT_REFUSED = 2
EXIT_AT_ONCE = 130  # the shell's 128 + SIGINT
SHARED_MEMORY_SECONDS = 1.0
CLOSING_SECONDS = 3.0  # that a worker whose checkpoint is written gets to close its connections


@dataclass(frozen=True)
class Ending:
    """How a volunteer's run ended: the exit code of `covey join`, and a line for stderr where it isn't 0."""

    exit_code: int
    message: str = ""


class Observer(Protocol):
    """Is told what happens: metrics, and what the terminal shows. Must neither block nor raise."""

    def event(self, event: WorkerEvent, status: PeerStatus) -> None:
        """The worker reported `event`, which is already folded into `status`."""

    def restarting(self, exit_code: int, delay_seconds: float, status: PeerStatus) -> None:
        """The worker failed (`exit_code` < 0: by that signal) and will be started again after the delay."""


class Supervisor:
    """One volunteer's worker. Set `leave` to end it in good order, and `hurry` for at once; `gone` follows.

    `command` runs a worker on the job's state directory (peer/job.py has the contract).
    """

    def __init__(self, job: Job, command: Sequence[str], observers: Sequence[Observer], status: PeerStatus, *,
                 backoff: Backoff, leave_seconds: float) -> None:
        self.status = status
        self.leave, self.hurry, self.gone = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._log, self._command, self._observers = job.config.log, command, observers
        self._identity_path = job.config.identity_path
        self._backoff, self._leave_seconds = backoff, leave_seconds
        self._refusal = ""

    async def run(self) -> Ending:
        """Runs workers until one finishes or refuses, or until leave or hurry is set. No child remains."""
        delay_seconds = 0.0
        try:
            while True:
                started = time.monotonic()
                exit_code = await self._work()
                ending = self._ending(exit_code)
                if ending:
                    return ending
                delay_seconds = self._backoff.after(delay_seconds, time.monotonic() - started)
                await self._rest(exit_code, delay_seconds)
                if self.leave.is_set():
                    return Ending(0)
        finally:
            self.status.state = "left"
            self.gone.set()

    async def _work(self) -> int:
        forget_worker(self.status)
        with scratch_dir(self._identity_path) as scratch:
            exit_code = await self._work_in(scratch)
            await asyncio.to_thread(_wait_for_shared_memory, scratch)
            return exit_code

    async def _work_in(self, scratch: Path) -> int:
        worker = await start_worker(self._command, self._log, scratch)
        self.status.worker_pid = worker.process.pid
        finished = asyncio.Event()
        reading = asyncio.create_task(self._read(worker.events_fd, finished))
        try:
            await self._follow(worker, finished)
        finally:
            exit_code = await worker.end()
            remove_libp2p_sockets(self._identity_path)
            self.status.worker_pid = 0
            await _first(reading, timeout_seconds=0.5)  # the last events; it ends when nobody holds the pipe
        return exit_code

    async def _follow(self, worker: Worker, finished: asyncio.Event) -> None:
        await _first(worker.process.wait(), finished.wait(), self.leave.wait())
        closing_seconds = CLOSING_SECONDS
        if self.leave.is_set():
            self.status.state = "leaving"
            worker.ask_to_leave()
            asked = time.monotonic()
            await _first(worker.process.wait(), finished.wait(), self.hurry.wait(), timeout_seconds=self._leave_seconds)
            closing_seconds = min(closing_seconds, asked + self._leave_seconds - time.monotonic())
        if finished.is_set():
            await _first(worker.process.wait(), self.hurry.wait(), timeout_seconds=closing_seconds)

    async def _read(self, events_fd: int, finished: asyncio.Event) -> None:
        async for event in read_events(events_fd):
            match event.WhichOneof("event"):
                case "refused":
                    self._refusal = event.refused.message
                case "finished":
                    finished.set()
            fold(self.status, event)
            for observer in self._observers:
                observer.event(event, self.status)

    def _ending(self, exit_code: int) -> Ending | None:
        if exit_code == 0 or self.status.HasField("finished"):
            return Ending(0)
        if self._refusal:
            return Ending(EXIT_REFUSED, self._refusal)
        if not self.leave.is_set():
            return None
        if exit_code == -signal.SIGTERM:  # asked before it had begun: there is nothing to put in order
            return Ending(0)
        how = "had to be ended" if exit_code == -signal.SIGKILL else f"failed with exit code {exit_code}"
        return Ending(EXIT_AT_ONCE if self.hurry.is_set() else 1,
                      f"the worker {how} while leaving; its last checkpoint is whole, its log {self._log}")

    async def _rest(self, exit_code: int, delay_seconds: float) -> None:
        self.status.state = "restarting"
        self.status.worker_restarts += 1
        for observer in self._observers:
            observer.restarting(exit_code, delay_seconds, self.status)
        await _first(self.leave.wait(), timeout_seconds=delay_seconds)


def _wait_for_shared_memory(scratch: Path) -> None:
    """torch's manager of shared memory goes once its clients have, and aborts if its folder went before."""
    deadline = time.monotonic() + SHARED_MEMORY_SECONDS
    while any(scratch.glob("torch-shm-dir*")) and time.monotonic() < deadline:
        time.sleep(0.05)


async def _first(*waits: Awaitable[Any], timeout_seconds: float | None = None) -> None:
    """Returns with the first of `waits`, or after the timeout; gives up the others."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
