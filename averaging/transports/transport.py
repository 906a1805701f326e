"""What strategies know of the network: who is there, where the swarm stands, and how to average with some of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Standing:
    """Where the swarm stands, as this peer knows it."""

    epoch: int    # the highest collaborative epoch that a live peer is in
    samples: int  # gathered towards the update that ends this peer's epoch, by all peers, this one included
    peers: int    # that train, this one included
    archived: int = 0  # epoch of the newest state that an archive hands out; 0: there is none
    minority: bool = False  # more than half of the peers of this peer's epoch have other parameters than it


@dataclass(frozen=True)
class Outcome:
    """How a meeting ended. Not `averaged`: the tensors are as they were, to the bit."""

    averaged: bool
    members: tuple[str, ...] = ()    # whose mean it is, this peer included, sorted; empty unless averaged
    with_state: bool = False         # the state was averaged too
    silent: tuple[str, ...] = ()     # of the members, those that were not heard of any more at the end
    reason: str = ""                 # why not averaged, for people
    seconds: float = 0.0             # from `meet` to the end
    matchmaking_seconds: float = 0.0  # of these, until the group began to average
    bytes_sent: int = 0              # of tensors, as encoded
    bytes_received: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)  # contributions that were refused here, by reason
    group_id: bytes = b""            # where groups have names
    samples: Mapping[str, int] = field(default_factory=dict)  # of each member, those that are in the mean


class Meeting(Protocol):
    """A group that is to average, in the background."""

    def done(self) -> bool:
        """Whether `result` would return at once."""

    def result(self) -> Outcome:
        """Waits for the end, and if the group averaged, writes the mean into the tensors that were handed over."""

    def cancel(self) -> None:
        """From any thread: give it up soon; `result` then tells how it ended."""


class Transport(Protocol):
    """The way to the other peers. One thread uses it, but for `cancel`, `close` and what `offer_state` hands in."""

    @property
    def peer_id(self) -> str:
        """Who this peer is among `members`."""

    def report(self, epoch: int, samples: int, fingerprint: bytes = b"") -> None:
        """Tell others that this peer is in `epoch`, with `samples` of its own towards the next update.

        `fingerprint`: equal bytes mean equal parameters (averaging/sketch.py). Returns at once.
        """

    def standing(self) -> Standing:
        """The newest that is known; never waits for the network."""

    def is_due(self, epoch: int) -> bool:
        """Whether the swarm has gathered the samples that end `epoch`, or others already meet at its end."""

    def members(self, epoch: int) -> tuple[str, ...]:
        """Who can be met at the end of `epoch`, sorted, this peer included."""

    def meet(self, tensors: Sequence[Tensor], weight: float, *, kind: str, epoch: int, group: Sequence[str],
             compression: str = "none", buffers: Sequence[Tensor] = (), state: Sequence[Tensor] = (),
             fingerprint: bytes = b"", state_compression: str = "none", samples: int = 0) -> Meeting:
        """Average `tensors`, floating point and of any device, with `group`: the mean weighted by `weight`s, over
        those who took part, equal bits on all of them.

        All or nothing. One meeting is held per (kind, epoch); a peer that is not there within the deadlines is left
        behind. `weight` 0: contributes nothing, receives the mean. Without tensors (an auxiliary peer) it helps to
        reduce only. `buffers` are averaged too, at a scale of their own; and `state`, unless all members'
        `fingerprint`s are equal. `compression` is of `tensors`, `state_compression` of the others.
        `samples`: how many of this peer's are in what it brings, each said once, so that volunteers can be credited
        with them; nobody is where all processes have one owner (averaging/transports/world.py).
        The tensors must not change until `result`.
        """

    def offer_state(self, read: Callable[[], Mapping[str, Tensor]]) -> None:
        """Let others download what `read` returns; it is called from another thread."""

    def fetch_state(self) -> tuple[int, dict[str, Tensor]] | None:
        """The epoch and state of a peer that is further on or of the majority; None if nobody sent one in time."""

    def close(self) -> None:
        """Take leave; nothing of the transport remains."""
