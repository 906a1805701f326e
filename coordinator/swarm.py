"""The swarm as its peers' records tell it: a pure function of the records read so far and the clock.

A record says what its peer believes of itself. It is signed, so nobody else wrote it; that it is true, nobody
knows. In particular the epoch is the highest that any live peer claims.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite, sqrt
from statistics import median
from struct import calcsize, unpack
from typing import Any

from averaging.records import ARCHIVING, PeerRecord, Refusals, Rounds, RoundSeconds

LEAVING_SECONDS = 10.0  # a peer that said it leaves is gone after this long: leaving takes no longer
SKETCH = "<32f8x"  # of averaging/sketch.py; the checksum at its end is passed over
MOST = 2**63 - 1  # that a sum can be: who signs figures near it must not make it one that nothing can carry
REMEMBERED = 10_000  # peers that are gone and whose counters are kept, for when they come back


@dataclass(frozen=True)
class Peer:
    """A peer's newest record, and when it was first read (Unix seconds, our clock)."""

    record: PeerRecord
    heard: float


@dataclass(frozen=True)
class Counters:
    """What all peers reported since the coordinator first looked; a peer's restart takes nothing away."""

    samples: int = 0
    rounds: Rounds = field(default_factory=Rounds)
    seconds: RoundSeconds = field(default_factory=RoundSeconds)
    refused: Refusals = field(default_factory=Refusals)

    def grown(self, early: "Counters", late: "Counters") -> "Counters":
        """These, and what was counted from `early` to `late`."""
        samples, averaged, failed, alone, value, absent, message, *seconds = (
            min(so_far + (after - before), MOST) for so_far, before, after  # in this order: seconds are rounded
            in zip(self.amounts, early.amounts, late.amounts, strict=True))
        return Counters(samples, Rounds(averaged, failed, alone), RoundSeconds(*seconds),
                        Refusals(value, absent, message))

    @property
    def amounts(self) -> tuple[Any, ...]:
        """All of them, in a fixed order: integers, then seconds."""
        rounds, seconds, refused = self.rounds, self.seconds, self.refused
        return (self.samples, rounds.averaged, rounds.failed, rounds.alone, refused.value, refused.absent,
                refused.message, seconds.averaged, seconds.failed)


@dataclass(frozen=True)
class SwarmState:
    """The swarm at `time` (Unix seconds; 0 before the first reading). `joins - left - lost == len(peers)`."""

    time: float = 0.0
    peers: Mapping[str, Peer] = field(default_factory=dict)  # live ones by peer id
    gone: Mapping[str, Peer] = field(default_factory=dict)  # by peer id, the longest gone first
    counters: Counters = field(default_factory=Counters)
    joins: int = 0
    left: int = 0  # departures announced by the peer's last record
    lost: int = 0  # departures by silence
    epoch: int = 0  # highest collaborative epoch of the live peers; the last known one while there are none
    since: float = 0.0  # Unix seconds of the first reading, from which on counters, joins and departures count

    @property
    def epoch_samples(self) -> int:
        """Samples gathered towards the next epoch, by the peers that will bring them into it."""
        gathered = sum(record.samples_accumulated for record in self._staying() if record.epoch == self.epoch)
        return min(gathered, MOST)

    @property
    def samples_per_second(self) -> float:
        """Sum over the peers."""
        return sum((record.samples_per_second for record in self._staying()), 0.0)

    @property
    def loss(self) -> float | None:
        """Mean of the peers' last finished epochs, weighted by samples per second; None before the first."""
        known = [(record.loss, record.samples_per_second) for record in self._staying()
                 if record.loss is not None]
        total = sum(weight for _, weight in known)
        if total > 0:
            return sum(loss * (weight / total) for loss, weight in known)
        return sum(loss for loss, _ in known) / len(known) if known else None

    @property
    def group_size(self) -> int:
        """Peers in the largest of the live peers' last averaging rounds; 0 before the first."""
        return max((peer.record.group_size for peer in self.peers.values()), default=0)

    @property
    def round_seconds(self) -> float | None:
        """Median of what the peers' last rounds with others took, so that one who lies moves it little; None before
        the first."""
        return median(spans) if (spans := [r.round_seconds for r in self._staying() if r.round_seconds]) else None

    @property
    def consensus_distance(self) -> float | None:
        """Root mean square distance of parameters from their mean, over the peers of the newest epoch, estimated from
        their sketches (averaging/sketch.py), which are linear; None if fewer than two of them are known."""
        sketches = [record.sketch for record in self._staying() if record.epoch == self.epoch and record.sketch]
        vectors = [unpack(SKETCH, sketch) for sketch in sketches if len(sketch) == calcsize(SKETCH)]
        vectors = [vector for vector in vectors if all(map(isfinite, vector))]  # who knows what a stranger signs
        if len(vectors) < 2:
            return None
        means = [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]
        squares = sum((value - mean) ** 2 for vector in vectors for value, mean in zip(vector, means, strict=True))
        return sqrt(squares / len(vectors))

    def _staying(self) -> list[PeerRecord]:
        return [peer.record for peer in self.peers.values() if peer.record.state != "leaving"]


def observe(previous: SwarmState, records: Iterable[PeerRecord], now: float, *, stale_seconds: float,
            banned: Collection[str] = ()) -> SwarmState:
    """What `previous` becomes when `records` were read from the DHT at `now` (Unix seconds), in any order.

    A peer is live while its newest record was first read at most `stale_seconds` ago. Its own clock counts at
    first sight only, so that a wrong one does no harm for long. That a record is missing from one reading
    proves nothing: only silence does. Call it for readings only: who can't read has lost nobody. Who is `banned`, by
    peer id, is gone at once. An archive is no peer.
    """
    peers, gone, counters = dict(previous.peers), dict(previous.gone), previous.counters
    for record in _newest(record for record in records
                           if record.peer_id not in banned and record.state != ARCHIVING):
        known = peers.get(record.peer_id) or gone.get(record.peer_id)
        peer = Peer(record, now if known else min(now, record.time))
        if _is_news(record, known, now, stale_seconds) and _is_live(peer, now, stale_seconds):
            peers[record.peer_id] = peer
            gone.pop(record.peer_id, None)
            counters = _count(counters, known.record if known else None, record)
    live = {peer_id: peer for peer_id, peer in sorted(peers.items())
            if _is_live(peer, now, stale_seconds) and peer_id not in banned}
    departed = {peer_id: peer for peer_id, peer in sorted(peers.items()) if peer_id not in live}
    left = sum(peer.record.state == "leaving" for peer in departed.values())
    return SwarmState(
        time=now, peers=live, gone=dict(list({**gone, **departed}.items())[-REMEMBERED:]), counters=counters,
        joins=previous.joins + len(peers.keys() - previous.peers.keys()),
        left=previous.left + left, lost=previous.lost + len(departed) - left,
        epoch=max((peer.record.epoch for peer in live.values()), default=previous.epoch), since=previous.since or now)


def _newest(records: Iterable[PeerRecord]) -> list[PeerRecord]:
    # by content as well, so that of two with one time the same one wins in any order
    by_age = sorted(records, key=lambda record: (record.time, repr(record)))
    return sorted({record.peer_id: record for record in by_age}.values(), key=lambda record: record.peer_id)


def _is_live(peer: Peer, now: float, stale_seconds: float) -> bool:
    return now - peer.heard <= (LEAVING_SECONDS if peer.record.state == "leaving" else stale_seconds)


def _is_news(record: PeerRecord, known: Peer | None, now: float, stale_seconds: float) -> bool:
    if known is None:
        return True
    # An older one is some node's old copy. Copies last `stale_seconds`: after that, its clock was set back.
    return record.time > known.record.time or (now - known.heard > stale_seconds and record != known.record)


def _count(counters: Counters, before: PeerRecord | None, record: PeerRecord) -> Counters:
    early = _tallies(before) if before and not _restarted(before, record) else Counters()
    return counters.grown(early, _tallies(record))


def _restarted(before: PeerRecord, record: PeerRecord) -> bool:
    # The worker behind `record` is another one than before, and counts from 0.
    came_back = before.state == "leaving" != record.state
    then, now = _tallies(before).amounts, _tallies(record).amounts
    return came_back or any(late < early for early, late in zip(then, now, strict=True))


def _tallies(record: PeerRecord) -> Counters:
    return Counters(record.samples_total, record.rounds, record.seconds, record.refused)
