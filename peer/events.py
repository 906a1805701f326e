"""The pipe from worker to daemon: WorkerEvent messages, each after its length (4 bytes, big-endian)."""

import os
import select
import threading
import time
from collections.abc import AsyncIterator

from averaging.pipe import framed, read_messages
from proto.peer_pb2 import WorkerEvent


class EventWriter:
    """The worker's end. Training never waits for a slow daemon: a Step that doesn't fit is dropped.

    Any thread may send. `fd` is the inherited write end of the pipe; it is closed to programs that the worker
    starts. `timeout_seconds` bounds the wait for an event other than a Step.
    """

    def __init__(self, fd: int, *, timeout_seconds: float = 5.0) -> None:
        os.set_blocking(fd, False)
        os.set_inheritable(fd, False)
        self._fd, self._timeout_seconds = fd, timeout_seconds
        self._unsent = b""  # the tail of a message that the pipe took only in part
        self._lock = threading.Lock()

    def send(self, event: WorkerEvent) -> bool:
        """Whether `event` was taken: False if the pipe stayed full, or the daemon is gone."""
        wait_seconds = 0.0 if event.WhichOneof("event") == "step" else self._timeout_seconds
        with self._lock:
            try:
                return self._send(framed(event), wait_seconds)
            except BrokenPipeError:
                return False

    def _send(self, frame: bytes, wait_seconds: float) -> bool:
        deadline = time.monotonic() + wait_seconds
        if not self._flush(deadline):
            return False
        self._unsent = frame
        if self._flush(deadline) or len(self._unsent) < len(frame):
            return True  # the tail of a message begun goes out before the next one
        self._unsent = b""
        return False

    def _flush(self, deadline: float) -> bool:
        while self._unsent:
            try:
                self._unsent = self._unsent[os.write(self._fd, self._unsent):]
            except BlockingIOError:
                if not self._wait(deadline - time.monotonic()):
                    return False
        return True

    def _wait(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        return seconds > 0 and bool(poll.poll(seconds * 1000))


async def read_events(fd: int) -> AsyncIterator[WorkerEvent]:
    """The daemon's end: every event until all writers have closed the pipe. Takes `fd` over and closes it."""
    async for event in read_messages(fd, WorkerEvent):
        yield event
