"""The swarm as a transport, seen by the trainer: all waiting for the network is done by a process of its own.

`Swarm` forks that process, the averager, and talks with it over a channel; a thread here takes what it says. Failure:
a meeting that does not come about ends with an Outcome that says why. An averager that is gone makes every call raise
AveragerLost; nothing mends that but a new worker.
"""

import averaging.fork  # noqa: F401

# isort: split
import hashlib
import logging
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from time import monotonic
from typing import Any, TypeVar

import safetensors.torch
import torch
from hivemind.utils import get_dht_time
from hivemind.utils.crypto import RSAPrivateKey
from torch import Tensor

from averaging import roster
from averaging.authorisation import Authoriser, OpenSwarm
from averaging.bulletin import Bulletin
from averaging.config import Averaging
from averaging.dht import DHT
from averaging.messages import NOTHING, Layout, RoundId
from averaging.receipt_records import ReceiptBook
from averaging.receipts import Receipt
from averaging.transports.swarm.averager import Setup, serve
from averaging.transports.swarm.channel import (
    Board,
    Cancel,
    Drop,
    Ended,
    Fetch,
    Fetched,
    Know,
    Meet,
    Ready,
    StateMade,
    StateWanted,
    channel,
    floats,
)
from averaging.transports.swarm.state import STATE_HEADER, donors, tensors_in
from averaging.transports.transport import Outcome, Standing

START_SECONDS = 15.0
LEAVE_SECONDS = 0.5    # that the averager has for taking leave
SPARE_SECONDS = 5.0    # beyond its own deadlines that the averager may take to answer: longer, and it hangs
ARCHIVE_REST_SECONDS = 60.0  # that an archive is left alone which gave nothing: training goes on meanwhile
SPARE_MEMORIES = 4     # kept for the next meetings, of all sizes together
SMOOTHING = 0.3        # share of the newest micro-batch in the mean duration
Result = TypeVar("Result")
log = logging.getLogger(__name__)


class AveragerLost(RuntimeError):
    """The averager process is gone, or does not answer: this worker can't average any more."""


@dataclass(frozen=True)
class _Memory:
    """Shared with the averager: what this peer gives to one meeting, and the mean that comes out of it."""

    number: int
    given: Tensor  # [values] float32
    mean: Tensor   # the same


class SwarmMeeting:
    """One meeting, while the averager sees to it."""

    def __init__(self, tensors: Sequence[Tensor], state: Sequence[Tensor], memory: _Memory | None, *, patience: float,
                 met: Callable[[Outcome], None], cancel: Callable[[], None],
                 release: Callable[[bool], None]) -> None:
        self._tensors, self._state, self._memory = tensors, state, memory
        self._started, self._patience = monotonic(), patience
        self._met, self._cancel, self._release = met, cancel, release
        self._ended: Future[Outcome] = Future()
        self._outcome: Outcome | None = None

    def done(self) -> bool:
        """Whether `result` would return at once."""
        return self._ended.done()

    def result(self) -> Outcome:
        """Waits for the end, and if the group averaged, writes the mean into the tensors. Raises AveragerLost."""
        if self._outcome is None:
            outcome = self._wait()
            self._write(outcome)
            self._release(True)
            self._outcome, self._tensors, self._state, self._memory = outcome, (), (), None
        return self._outcome

    def _wait(self) -> Outcome:
        try:
            return _awake(lambda seconds: self._ended.result(timeout=seconds), self._patience)
        except TimeoutError:
            self._release(False)  # whatever it may still write to the memory must not come anywhere
            raise AveragerLost("the averager process did not end a meeting within its deadlines") from None

    def cancel(self) -> None:
        """From any thread: give it up soon; `result` then tells how it ended."""
        if not self._ended.done():
            with suppress(AveragerLost):
                self._cancel()

    def end(self, outcome: Outcome) -> None:
        """The averager says so."""
        if not self._ended.done():
            if outcome.averaged:
                self._met(outcome)
            self._ended.set_result(replace(outcome, seconds=monotonic() - self._started))

    def fail(self, error: AveragerLost) -> None:
        """There will be no outcome."""
        if not self._ended.done():
            self._ended.set_exception(error)

    @torch.no_grad()
    def _write(self, outcome: Outcome) -> None:
        if outcome.averaged and self._memory:
            written = [*self._tensors, *(self._state if outcome.with_state else ())]
            torch._foreach_copy_(written, _parts(self._memory.mean, written))


class Swarm:
    """A peer's way to the others: hivemind's DHT and libp2p, rounds of our own (averaging/round.py).

    Make it in the main thread right after `start_dht`, before CUDA and threads: it forks. `key` is the libp2p
    identity; it signs what this peer says. `client_mode`: this peer accepts no incoming connections. `auxiliary`: it
    has nothing to average and helps others to. `authoriser` decides who is a member. `receipts`: where committed rounds
    are noted, so that their members are credited.
    Raises AveragerLost if the averager does not come up.
    """

    def __init__(self, *, dht: DHT, run_id: str, key: RSAPrivateKey, config: Averaging, bulletin: Bulletin,
                 client_mode: bool = False, auxiliary: bool = False, authoriser: Authoriser | None = None,
                 receipts: ReceiptBook | None = None) -> None:
        self.peer_id = str(dht.peer_id)
        self._config, self._bulletin, self._board, self._receipts = config, bulletin, Board(), receipts
        self._epoch = self._samples = 0
        self._reported: tuple[int, float] | None = None  # the epoch, and when
        self._known = frozenset[str]()
        self._numbers, self._lock = 0, Lock()
        self._meetings: dict[int, SwarmMeeting] = {}
        self._memories: list[_Memory] = []
        self._fetched: SimpleQueue[Fetched | None] = SimpleQueue()
        self._wanted: SimpleQueue[bool] = SimpleQueue()
        self._archives_rest_until = -math.inf  # by the monotonic clock
        self._read: Callable[[], Mapping[str, Tensor]] | None = None
        self._state_bytes, self._outline = 0, dict[str, tuple[torch.dtype, torch.Size]]()
        self._is_lost, self._is_closing = False, False
        self._ready: Future[None] = Future()
        self._start(Setup(
            run_id=run_id, key=key, config=config, peer_id=self.peer_id, authoriser=authoriser or OpenSwarm(),
            mode="auxiliary" if auxiliary else "client" if client_mode else "node", board=self._board,
            daemon=dht.daemon_address(START_SECONDS)))

    def _start(self, setup: Setup) -> None:
        self._channel, theirs = channel()
        self._process = multiprocessing.get_context("fork").Process(
            target=serve, args=(setup, theirs, self._channel, os.getpid()), name="averager", daemon=True)
        self._process.start()
        theirs.close()
        self._listener = Thread(target=self._listen, name="averager's word", daemon=True)
        self._listener.start()
        Thread(target=self._donate, name="state donor", daemon=True).start()
        try:
            self._ready.result(timeout=START_SECONDS)
        except (TimeoutError, AveragerLost):
            self.close()
            raise AveragerLost("the averager process did not start; its words are in the log above") from None

    @property
    def is_alive(self) -> bool:
        """Whether the averager lives; if not, only a new worker helps."""
        return not self._is_lost and bool(self._process.is_alive())

    @property
    def averager_pid(self) -> int:
        """Of the averager process."""
        assert self._process.pid is not None
        return self._process.pid

    def report(self, epoch: int, samples: int, fingerprint: bytes = b"") -> None:
        """Tell others that this peer is in `epoch`, with `samples` of its own towards the next update."""
        now = monotonic()
        if self._reported and self._reported[0] == epoch:  # in another epoch, time went into averaging too
            took, mean = now - self._reported[1], self._board.step_seconds
            self._board.step_seconds = mean + SMOOTHING * (took - mean) if mean else took
        if self._board.step_seconds:
            self._board.expected = now + self._board.step_seconds
        self._reported, self._epoch, self._samples, self._board.epoch = (epoch, now), epoch, samples, epoch
        self._bulletin.update(epoch=epoch, samples_accumulated=samples, step_seconds=self._board.step_seconds,
                              sketch=fingerprint)
        self._acquaint(record.peer_id for record in self._bulletin.records())

    def standing(self) -> Standing:
        """The newest that is known; never waits for the network."""
        there = roster.standing(self._bulletin.present(), self.peer_id, self._epoch, self._samples, get_dht_time(),
                                longest_seconds=2 * self._config.max_refresh_period)
        return replace(there, archived=0) if monotonic() < self._archives_rest_until else there

    def is_due(self, epoch: int) -> bool:
        """Whether the swarm has gathered the samples that end `epoch`, or others already meet at its end."""
        if self._board.called == epoch:
            return True
        standing = self.standing()
        return standing.epoch > epoch or standing.samples >= self._config.target_batch_size

    def members(self, epoch: int) -> tuple[str, ...]:
        """Who can be met at the end of `epoch`, sorted, this peer included."""
        return roster.members(self._bulletin.present(), self.peer_id, epoch, known_before=self._bulletin.known_before,
                              now=get_dht_time())

    @torch.no_grad()
    def meet(self, tensors: Sequence[Tensor], weight: float, *, kind: str, epoch: int, group: Sequence[str],
             compression: str = "none", buffers: Sequence[Tensor] = (), state: Sequence[Tensor] = (),
             fingerprint: bytes = b"", state_compression: str = "none", samples: int = 0) -> SwarmMeeting:
        """As Transport's. The tensors are copied at once, but must not change until `result` all the same."""
        self._acquaint(group)
        layout = Layout(_values(tensors), _values(buffers), _values(state), compression, state_compression)
        if not layout.values:
            layout = NOTHING
        memory = self._take_memory(layout.values) if layout.values else None
        if memory and weight:
            given = [*tensors, *buffers, *state]
            torch._foreach_copy_(_parts(memory.given, given), given)
        elif memory:
            memory.given.zero_()  # whatever is there, it counts for nothing: a NaN must not travel
        clients = {record.peer_id for record in self._bulletin.records() if record.client_mode}
        self._numbers += 1
        number, patience = self._numbers, longest_meeting(self._config) + SPARE_SECONDS
        meeting = self._meetings[number] = SwarmMeeting(
            [*tensors, *buffers], state, memory, patience=patience, cancel=lambda: self._send(Cancel(number)),
            release=lambda is_sound: self._release(number, memory, is_sound),
            met=lambda outcome: self._has_met(epoch, group, outcome))
        try:
            self._send(Meet(
                number, RoundId(kind, epoch), tuple(group), tuple(clients.intersection(group)), float(weight), layout,
                fingerprint, memory.number if memory else None, samples))
        except AveragerLost:
            del self._meetings[number]
            raise
        return meeting

    def _has_met(self, epoch: int, group: Sequence[str], outcome: Outcome) -> None:
        self._bulletin.saw(epoch, group, set(outcome.members) - set(outcome.silent))
        if self._receipts and any(outcome.samples.values()):
            self._receipts.add(Receipt(epoch, outcome.group_id, outcome.samples))

    def offer_state(self, read: Callable[[], Mapping[str, Tensor]]) -> None:
        """Let others download what `read` returns, which must not change afterwards: copies.

        `read` is called from another thread, and once here for the size. Whoever changes the state must `report` the
        new epoch under the same lock that `read` takes, or a download may go by the wrong epoch.
        """
        state = read()
        self._state_bytes, self._outline = sum(tensor.nbytes for tensor in state.values()), _outline(state)
        self._read = read

    def fetch_state(self) -> tuple[int, dict[str, Tensor]] | None:
        """The epoch and state of a peer that is further on or of the majority; None if nobody sent one in time."""
        asked = donors(self._bulletin.records(), self.peer_id, self._epoch)
        if not asked:
            self._bulletin.hasten()
            return None
        if (found := self._fetch_from(asked)) is None:
            self._archives_rest_until = monotonic() + ARCHIVE_REST_SECONDS
        return found

    def _fetch_from(self, asked: tuple[str, ...]) -> tuple[int, dict[str, Tensor]] | None:
        limit, deadline = self._state_bytes + STATE_HEADER, monotonic() + self._config.load_state_timeout
        memory, view = self._share(limit)
        self._board.epoch = -1  # in no epoch that could end: nobody is to wait for this peer, whose state it waits for
        try:
            while asked and (seconds := deadline - monotonic()) > 0:
                self._send(Fetch(asked, memory, limit, self._epoch, seconds))
                fetched = self._wait_for_state(seconds)
                if not fetched.length:
                    log.warning("no state was downloaded: %s", fetched.problem)
                    return None
                if (state := tensors_in(view[:fetched.length])) is not None and _outline(state) == self._outline:
                    return fetched.epoch, state
                log.warning("what %s sent is no state of this experiment", fetched.donor)
                asked = asked[asked.index(fetched.donor) + 1:]
            return None
        finally:
            self._board.epoch = self._epoch
            with suppress(AveragerLost):
                self._send(Drop(memory))

    def _wait_for_state(self, seconds: float) -> Fetched:
        patience = seconds + SPARE_SECONDS
        try:
            fetched = _awake(lambda seconds: self._fetched.get(timeout=seconds), patience)
        except Empty:
            raise AveragerLost("the averager process did not end a download within its deadline") from None
        if fetched is None:
            raise AveragerLost("the averager process is gone")
        return fetched

    def close(self) -> None:
        """Take leave; nothing of the averager remains after a second at most."""
        self._is_closing = True
        with suppress(OSError):
            self._channel.hang_up()
        self._process.join(LEAVE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._wanted.put(False)
        self._listener.join(LEAVE_SECONDS)
        self._channel.close()

    def _acquaint(self, peers: Iterable[str]) -> None:
        if news := frozenset(peers) - self._known - {self.peer_id}:
            self._known |= news
            self._send(Know(tuple(sorted(news))))

    def _take_memory(self, values: int) -> _Memory:
        for place, memory in enumerate(self._memories):
            if len(memory.given) == values:
                return self._memories.pop(place)
        number, view = self._share(2 * values * 4)
        return _Memory(number, floats(view, 0, values), floats(view, values, values))

    def _release(self, number: int, memory: _Memory | None, is_sound: bool) -> None:
        self._meetings.pop(number, None)
        if memory and is_sound:
            self._memories.append(memory)
        dropped = self._memories.pop(0) if len(self._memories) > SPARE_MEMORIES else None if is_sound else memory
        if dropped:
            with suppress(AveragerLost):
                self._send(Drop(dropped.number))

    def _send(self, message: Any) -> None:
        try:
            self._channel.send(message)
        except OSError as error:
            raise AveragerLost("the averager process is gone") from error

    def _share(self, length: int) -> tuple[int, Any]:
        try:
            return self._channel.share(length)
        except OSError as error:
            raise AveragerLost("the averager process is gone, or there is no memory to share") from error

    def _listen(self) -> None:
        """A thread's work: take the averager's word, until it is gone."""
        with suppress(EOFError, OSError):
            while True:
                self._take_word(self._channel.receive())
        self._is_lost = True
        if not self._is_closing:
            log.error("the averager process is gone")
        error = AveragerLost("the averager process is gone")
        if not self._ready.done():
            self._ready.set_exception(error)
        for meeting in list(self._meetings.values()):
            meeting.fail(error)
        self._fetched.put(None)

    def _take_word(self, message: Any) -> None:
        match message:
            case Ready():
                self._ready.set_result(None)
            case Ended(number, outcome):
                if meeting := self._meetings.get(number):
                    meeting.end(outcome)
            case Fetched():
                self._fetched.put(message)
            case StateWanted():
                self._wanted.put(True)

    def _donate(self) -> None:
        """A thread's work: make snapshots when they are wanted."""
        while self._wanted.get():
            try:
                self._send(self._snapshot())
            except AveragerLost:
                return

    def _snapshot(self) -> StateMade:
        """What `read` returns, and its epoch, as one copy in shared memory."""
        nothing = StateMade(0, 0, b"", None)
        if (read := self._read) is None:
            return nothing
        try:
            epoch, state = _consistent(read, lambda: self._epoch)
            data = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
        except Exception:  # whatever the strategy's code raises: this peer goes on, without giving
            log.exception("the state could not be read for another peer")
            return nothing
        memory, view = self._share(len(data))
        view[:] = data
        return StateMade(epoch, len(data), hashlib.sha256(data).digest(), memory)


def longest_meeting(config: Averaging) -> float:
    """Seconds within which the averager ends every meeting, whatever others do, where round trips are short."""
    attempt = config.matchmaking_time + config.averaging_timeout + 6 * config.request_timeout
    return 2 * attempt


def _awake(wait: Callable[[float], Result], seconds: float) -> Result:
    """What `wait`, given a timeout, returns within `seconds`, not counting those for which this process is stopped."""
    for _ in range(math.ceil(seconds) - 1):
        with suppress(TimeoutError, Empty):
            return wait(1.0)
    return wait(1.0)


def _consistent(read: Callable[[], Mapping[str, Tensor]], epoch: Callable[[], int]) -> tuple[int, Mapping[str, Tensor]]:
    """What `read` returns, read while the epoch stood still."""
    while True:
        before, state = epoch(), read()
        if epoch() == before:
            return before, state


def _outline(state: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in state.items()}


def _values(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _parts(vector: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of `vector`, shaped as `tensors`, one behind the other."""
    lengths = [tensor.numel() for tensor in tensors]
    parts = torch.split(vector[:sum(lengths)], lengths) if lengths else ()
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
