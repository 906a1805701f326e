"""Several peers as threads of one process: the transport of tests, deterministic, with faults on demand; and of one
who meets nobody."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Condition
from time import monotonic

import torch
from torch import Tensor

from averaging.compression import decode, encode
from averaging.robust import centered_clip
from averaging.transports.transport import Outcome, Standing


@dataclass
class _Peer:
    auxiliary: bool
    is_late: bool  # joined when others had made updates
    epoch: int = 0
    samples: int = 0
    fingerprint: bytes = b""
    read: Callable[[], Mapping[str, Tensor]] | None = None
    fetches: bool = False  # and so comes to no round


@dataclass
class _Contribution:
    tensors: Sequence[Tensor]
    buffers: Sequence[Tensor]
    state: Sequence[Tensor]
    weight: float
    fingerprint: bytes
    codecs: tuple[str, str]
    samples: int = 0


@dataclass
class _Round:
    """One group's: who has come, and once it has ended, the mean, or why there is none."""

    expected: set[str]
    deadline: float
    came: dict[str, _Contribution] = field(default_factory=dict)
    reason: str | None = None  # of its end; empty: averaged
    mean: list[Tensor] = field(default_factory=list)  # float64, tensors and then state
    with_state: bool = False


class MemorySwarm:
    """What the peers' transports share. A peer is there from `join` to `close`.

    `quota`, samples: an epoch is due at a peer once it has gathered as many itself, whatever the others do: a fixed
    world, in which each micro-batch's place is known beforehand, and nobody is said to lag but a newcomer. Without it,
    an epoch is due once all have `target_batch_size` together, or one of them is at its end already.
    Faults: a peer `lost` in a round (kind, epoch, peer) is left behind by the others; a `failing` one (kind, epoch)
    fails for all. While the swarm is `slow`, no meeting is `done` before its result is asked for.
    `clip_radius`: of robust.centered_clip, instead of the plain mean.
    """

    def __init__(self, target_batch_size: int, *, quota: Mapping[str, int] | int | None = None,
                 join_seconds: float = 10.0, clip_radius: float | None = None) -> None:
        self.target_batch_size, self.quota, self.join_seconds = target_batch_size, quota, join_seconds
        self.clip_radius = clip_radius
        self.changed = Condition()
        self.peers: dict[str, _Peer] = {}
        self.rounds: dict[tuple[str, int, tuple[str, ...]], _Round] = {}
        self.rosters: dict[int, tuple[str, ...]] = {}  # the first word on who can be met at an epoch's end stands
        self.lost: set[tuple[str, int, str]] = set()
        self.failing: set[tuple[str, int]] = set()
        self.slow = False

    def join(self, peer_id: str, *, auxiliary: bool = False) -> "MemoryTransport":
        """A peer more."""
        with self.changed:
            self.peers[peer_id] = _Peer(auxiliary, is_late=any(peer.epoch for peer in self.peers.values()))
        return MemoryTransport(self, peer_id)


class MemoryTransport:
    """One peer's `transports.transport.Transport`."""

    def __init__(self, swarm: MemorySwarm, peer_id: str) -> None:
        self._swarm, self.peer_id = swarm, peer_id

    def report(self, epoch: int, samples: int, fingerprint: bytes = b"") -> None:
        with self._swarm.changed:
            if me := self._swarm.peers.get(self.peer_id):
                me.epoch, me.samples, me.fingerprint = epoch, samples, fingerprint

    def standing(self) -> Standing:
        with self._swarm.changed:
            peers = self._swarm.peers
            me = peers[self.peer_id]
            same = [peer for peer in peers.values() if peer.epoch == me.epoch]
            sketches = Counter(peer.fingerprint for peer in same if peer.fingerprint and me.fingerprint)
            in_pace = self._swarm.quota is not None and not me.is_late
            return Standing(epoch=me.epoch if in_pace else max(peer.epoch for peer in peers.values()),
                            samples=sum(peer.samples for peer in same),
                            peers=sum(not peer.auxiliary for peer in peers.values()),
                            minority=any(2 * count > len(same) and sketch != me.fingerprint
                                         for sketch, count in sketches.items()))

    def is_due(self, epoch: int) -> bool:
        with self._swarm.changed:
            quota, peers = self._swarm.quota, self._swarm.peers
            if quota is not None and not peers[self.peer_id].auxiliary:
                return peers[self.peer_id].samples >= (quota if isinstance(quota, int) else quota[self.peer_id])
            return (sum(peer.samples for peer in peers.values() if peer.epoch == epoch) >= self._swarm.target_batch_size
                    or any(peer.epoch > epoch for peer in peers.values())
                    or any(at == epoch for _, at, _ in self._swarm.rounds))

    def members(self, epoch: int) -> tuple[str, ...]:
        with self._swarm.changed:
            there = [name for name, peer in self._swarm.peers.items()
                     if self._swarm.quota is not None or peer.epoch in (epoch - 1, epoch) or name == self.peer_id]
            roster = self._swarm.rosters.setdefault(epoch, tuple(sorted(there)))
            return roster if self.peer_id in roster else (self.peer_id,)

    def meet(self, tensors: Sequence[Tensor], weight: float, *, kind: str, epoch: int, group: Sequence[str],
             compression: str = "none", buffers: Sequence[Tensor] = (), state: Sequence[Tensor] = (),
             fingerprint: bytes = b"", state_compression: str = "none", samples: int = 0) -> "MemoryMeeting":
        swarm, key = self._swarm, (kind, epoch, tuple(sorted(group)))
        with swarm.changed:
            round = swarm.rounds.setdefault(key, _Round(set(group), monotonic() + swarm.join_seconds))
            if (kind, epoch, self.peer_id) in swarm.lost:
                round.expected.discard(self.peer_id)
            else:
                round.came[self.peer_id] = _Contribution(
                    _detached(tensors), _detached(buffers), _detached(state), weight, fingerprint,
                    (compression, state_compression), samples)
            swarm.changed.notify_all()
        return MemoryMeeting(swarm, self.peer_id, (kind, epoch), round)

    def offer_state(self, read: Callable[[], Mapping[str, Tensor]]) -> None:
        with self._swarm.changed:
            self._swarm.peers[self.peer_id].read = read

    def fetch_state(self) -> tuple[int, dict[str, Tensor]] | None:
        with self._swarm.changed:
            others = [(peer.epoch, name, peer.read) for name, peer in sorted(self._swarm.peers.items())
                      if name != self.peer_id and peer.read and peer.epoch >= self._swarm.peers[self.peer_id].epoch]
            alike = Counter((peer.epoch, peer.fingerprint) for peer in self._swarm.peers.values())
            common = {name: alike[peer.epoch, peer.fingerprint] for name, peer in self._swarm.peers.items()}
        if not others:
            return None
        epoch, _, read = max(others, key=lambda other: (other[0], common[other[1]]))
        self._fetches(True)
        try:
            return epoch, dict(read())
        finally:
            self._fetches(False)

    def close(self) -> None:
        with self._swarm.changed:
            self._swarm.peers.pop(self.peer_id, None)
            self._swarm.changed.notify_all()

    def _fetches(self, fetches: bool) -> None:
        with self._swarm.changed:
            self._swarm.peers[self.peer_id].fetches = fetches
            self._swarm.changed.notify_all()


class MemoryMeeting:
    """A round that one peer takes part in."""

    def __init__(self, swarm: MemorySwarm, me: str, at: tuple[str, int], round: _Round) -> None:
        self._swarm, self._me, self._at, self._round = swarm, me, at, round
        self._began, self._cancelled = monotonic(), False

    def done(self) -> bool:
        with self._swarm.changed:
            return not self._swarm.slow and self._has_ended()

    def result(self) -> Outcome:
        with self._swarm.changed:
            while not self._has_ended():
                self._swarm.changed.wait(max(0.01, self._round.deadline - monotonic()))
        if self._me not in self._round.came or self._cancelled:
            return self._outcome("this peer was left behind")
        if self._round.reason:
            return self._outcome(self._round.reason)
        mine = self._round.came[self._me]
        receivers = [*mine.tensors, *mine.buffers, *(mine.state if self._round.with_state else ())]
        with torch.no_grad():
            for tensor, mean in zip(receivers, self._round.mean if receivers else (), strict=True):
                tensor.copy_(mean)
        return self._outcome("")

    def cancel(self) -> None:
        with self._swarm.changed:
            if not self._has_ended():
                self._cancelled = True
                self._round.expected.discard(self._me)
                self._round.came.pop(self._me, None)
                self._swarm.changed.notify_all()

    def _outcome(self, reason: str) -> Outcome:
        seconds, members = monotonic() - self._began, tuple(sorted(self._round.came))
        return Outcome(averaged=not reason, members=() if reason else members, reason=reason, seconds=seconds,
                       with_state=self._round.with_state and not reason, samples={} if reason else {
                           peer: given.samples for peer, given in self._round.came.items()})

    def _has_ended(self) -> bool:
        """Whether it has, or ends now: all who are expected have come, or the deadline is over."""
        round = self._round
        if self._cancelled or round.reason is not None or self._me not in round.came:
            return True
        peers = self._swarm.peers
        coming = {peer for peer in round.expected - round.came.keys() if peer in peers and not peers[peer].fetches}
        if not coming or monotonic() >= round.deadline:
            is_to_fail = self._at in self._swarm.failing
            round.reason = "the round was made to fail" if is_to_fail else _average(round, self._swarm.clip_radius)
            self._swarm.changed.notify_all()
        return round.reason is not None


def _average(round: _Round, clip_radius: float | None) -> str:
    """The mean of those who came, or why there is none."""
    if len(round.came) < 2:
        return "nobody else came"
    givers = [given for _, given in sorted(round.came.items()) if given.tensors]
    total = sum(given.weight for given in givers)
    if not total:
        return "nobody has anything to give"
    round.with_state = len({given.fingerprint for given in givers}) > 1
    shares, (codec, state_codec) = [given.weight / total for given in givers], givers[0].codecs
    round.mean = _mean([given.tensors for given in givers], shares, codec, clip_radius)
    round.mean += _mean([given.buffers for given in givers], shares, state_codec, clip_radius)
    if round.with_state:
        round.mean += _mean([given.state for given in givers], shares, state_codec, clip_radius)
    return ""


def _detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach() for tensor in tensors]


def _mean(contributions: Sequence[Sequence[Tensor]], weights: Sequence[float], codec: str,
          clip_radius: float | None) -> list[Tensor]:
    """Of what arrives: each contribution, and then the mean, as `codec` makes of it."""
    if not contributions[0]:
        return []
    rows = [_through(codec, torch.cat([tensor.reshape(-1).float().cpu() for tensor in tensors]))
            for tensors, weight in zip(contributions, weights, strict=True) if weight]
    shares = [weight for weight in weights if weight]
    if clip_radius is None:
        mean = torch.zeros((), dtype=torch.float64)
        for values, share in zip(rows, shares, strict=True):
            mean = mean + share * values.double()
    else:
        mean = centered_clip(torch.stack(rows), torch.tensor(shares), clip_radius)
    mean = _through(codec, mean.float())
    return [part.view(tensor.shape) for part, tensor in zip(
        torch.split(mean, [tensor.numel() for tensor in contributions[0]]), contributions[0], strict=True)]


def _through(codec: str, values: Tensor) -> Tensor:
    return values if codec == "none" else decode(codec, encode(codec, values), values.numel())
