"""Between the trainer and its averager process: messages, shared memory without a name, and a few shared numbers.

Memory is an anonymous file (memfd) whose descriptor is handed over: nothing is left behind however the two end, and
the size of /dev/shm, 64 MiB in many containers, does not bound it.
"""

import mmap
import multiprocessing
import os
import socket
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from averaging.messages import Layout, RoundId
from averaging.transports.transport import Outcome

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Share:
    """Memory follows, which both sides know by this number from here on."""

    memory: int
    length: int


@dataclass(frozen=True)
class Drop:
    """The trainer uses this memory no more."""

    memory: int


@dataclass(frozen=True)
class Know:
    """These peers may be met: connect to them before it matters."""

    peers: tuple[str, ...]


@dataclass(frozen=True)
class Meet:
    """Average. The memory holds what this peer gives, as `layout` says, and room for the mean, both float32."""

    meeting: int
    round: RoundId
    group: tuple[str, ...]
    clients: tuple[str, ...]  # of the group, those that accept no connections, as far as is known
    weight: float
    layout: Layout
    fingerprint: bytes
    memory: int | None        # None: an auxiliary, it gives nothing
    samples: int = 0          # that are in what it gives


@dataclass(frozen=True)
class Cancel:
    """Give this meeting up soon."""

    meeting: int


@dataclass(frozen=True)
class Ended:
    """How a meeting ended; the mean is in its memory if it was averaged."""

    meeting: int
    outcome: Outcome


@dataclass(frozen=True)
class StateWanted:
    """Somebody downloads: make a snapshot of the state."""


@dataclass(frozen=True)
class StateMade:
    """The snapshot, safetensors; the averager's from here on. No memory: there is no state to give."""

    epoch: int
    length: int
    sha256: bytes
    memory: int | None


@dataclass(frozen=True)
class Fetch:
    """Download a state into this memory from one of the donors, the first that sends a good one."""

    donors: tuple[str, ...]
    memory: int
    limit: int           # bytes
    epoch: int           # an older state is of no use
    seconds: float       # for all together


@dataclass(frozen=True)
class Fetched:
    """The download's end; `length` 0: nobody sent a state in time."""

    donor: str
    epoch: int
    length: int
    problem: str


class Ready:
    """The averager serves."""


class Channel:
    """One end. `send` and `share` may be called from any thread; `receive` from one."""

    def __init__(self, messages: "Connection[Any, Any]", handles: socket.socket) -> None:
        self._messages, self._handles, self._lock, self._shared = messages, handles, Lock(), 0

    def fileno(self) -> int:
        """For those who wait until there is something to receive."""
        return self._messages.fileno()

    def send(self, message: Any) -> None:
        """Raises OSError when the other side is gone."""
        with self._lock:
            self._messages.send(message)

    def share(self, length: int) -> tuple[int, mmap.mmap]:
        """New memory of `length` bytes, zeros, that the other side sees too; its number, and this side's view."""
        file = _anonymous_file()
        try:
            os.ftruncate(file, max(1, length))
            with self._lock:
                self._shared += 1
                socket.send_fds(self._handles, [b"\0"], [file])
                self._messages.send(Share(self._shared, length))
                return self._shared, mmap.mmap(file, max(1, length))
        finally:
            os.close(file)

    def accept(self, share: Share) -> mmap.mmap:
        """The memory that the message `share` announced."""
        _, files, _, _ = socket.recv_fds(self._handles, 1, 1)
        try:
            return mmap.mmap(files[0], max(1, share.length))
        finally:
            os.close(files[0])

    def receive(self) -> Any:
        """The next message, waited for. Raises EOFError or OSError when the other side is gone."""
        return self._messages.recv()

    def has_message(self) -> bool:
        """Whether `receive` would return, or raise, at once."""
        return self._messages.poll()

    def hang_up(self) -> None:
        """Both sides see the end, whoever else may hold a copy of these sockets."""
        with socket.socket(fileno=os.dup(self._messages.fileno())) as messages:
            messages.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """This side's copies only."""
        self._messages.close()
        self._handles.close()


def channel() -> tuple[Channel, Channel]:
    """Two ends that are connected."""
    ours, theirs = multiprocessing.Pipe(duplex=True)
    our_handles, their_handles = socket.socketpair()
    return Channel(ours, our_handles), Channel(theirs, their_handles)


def floats(memory: mmap.mmap, start: int, count: int) -> Tensor:
    """`count` float32 values of `memory`, from value `start` on; no copy."""
    if not count:
        return torch.empty(0)
    return torch.frombuffer(memory, dtype=torch.float32, count=count, offset=start * FLOAT32_BYTES)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("covey")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Board:
    """Numbers that trainer and averager both see at once; made before the fork. Times are monotonic."""

    def __init__(self) -> None:
        self._values = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("d")
        self.epoch = self.called = -1
        self.expected = self.step_seconds = 0.0

    @property
    def epoch(self) -> int:
        """The trainer's; -1: it has not said."""
        return int(self._values[0])

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._values[0] = epoch

    @property
    def called(self) -> int:
        """The last epoch at whose end others are known to meet; -1: none."""
        return int(self._values[1])

    @called.setter
    def called(self, epoch: int) -> None:
        self._values[1] = epoch

    @property
    def expected(self) -> float:
        """When the trainer's micro-batch should be done; 0: unknown."""
        return self._values[2]

    @expected.setter
    def expected(self, time: float) -> None:
        self._values[2] = time

    @property
    def step_seconds(self) -> float:
        """That a micro-batch takes the trainer, smoothed."""
        return self._values[3]

    @step_seconds.setter
    def step_seconds(self, seconds: float) -> None:
        self._values[3] = seconds
