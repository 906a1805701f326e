"""Who meets whom, and where the swarm stands: read off the peers' signed records. Pure: records and the time go in."""

from collections import Counter
from collections.abc import Iterable, Sequence, Set
from hashlib import sha256
from itertools import pairwise

from averaging.config import Averaging
from averaging.records import ARCHIVING, PeerRecord
from averaging.transports.transport import Standing

FEW = 4  # peers; in larger swarms each tells of itself less often, so that there is not more to read each second
RECENT_SECONDS = 20.0  # two of the longest refresh periods, by default: who lives has written since


def partition(peers: Iterable[str], *, key: str, target_group_size: int) -> list[tuple[str, ...]]:
    """The peers in as few groups of at most `target_group_size` as possible, of sizes that differ by one at most.

    Who is with whom is drawn by a hash that changes with `key`, so that groups mix from one epoch to the next. Nobody
    is left alone: where groups of two and an odd number of peers would do that, one group has three.
    """
    drawn = sorted(set(peers), key=lambda peer: sha256(f"{key}/{peer}".encode()).digest())
    count = min(-(-len(drawn) // target_group_size), max(1, len(drawn) // 2))
    cuts = [len(drawn) * number // max(1, count) for number in range(count + 1)]
    return [tuple(sorted(drawn[first:last])) for first, last in pairwise(cuts)]


def group_of(me: str, peers: Iterable[str], *, key: str, target_group_size: int) -> tuple[str, ...]:
    """The group of `partition` that this peer is in; `peers` need not name it."""
    groups = partition({me, *peers}, key=key, target_group_size=target_group_size)
    return next(group for group in groups if me in group)


def members(records: Sequence[PeerRecord], me: str, epoch: int, *, known_before: int, now: float) -> tuple[str, ...]:
    """Who can be met at the end of `epoch`, sorted, this peer included: all who train, and auxiliaries.

    A record counts if it is of this epoch or one beside it, or at most RECENT_SECONDS old: readings lag, by several
    epochs where a node of the DHT has just been lost, and who is in another epoch says so when called, while who is
    passed over averages alone. If fewer than half of the `known_before` peers are left (see `known`), this peer may be
    the one that is cut off: it meets nobody until the records of the others have expired, and `known_before` with them.
    """
    there = _there(records, me, epoch, now)
    return tuple(sorted(there)) if 2 * len(there) >= known_before else (me,)


def known(records: Sequence[PeerRecord], me: str, epoch: int, before: Set[str], now: float) -> frozenset[str]:
    """The swarm that this peer knows as `epoch` begins, having known `before`: whom it can meet.

    If these are fewer than half of those before, it stays as it was, less whose record has expired and who took leave.
    Who is only starting, or has not caught up yet, is not known; nor is who died when more than half were left.
    """
    there = frozenset(_there(records, me, epoch, now))
    lasting = still(before, records)
    return there if 2 * len(there) >= len(lasting) else lasting


def still(known: Set[str], records: Sequence[PeerRecord]) -> frozenset[str]:
    """Of the `known`, those whose records have not expired, and who have not taken leave."""
    return frozenset(known & {record.peer_id for record in records if record.state != "leaving"})


def _there(records: Sequence[PeerRecord], me: str, epoch: int, now: float) -> set[str]:
    return {me, *(record.peer_id for record in records if record.state == "training" and (
        abs(epoch - record.epoch) <= 1 or now - record.time <= RECENT_SECONDS))}


def standing(records: Sequence[PeerRecord], me: str, epoch: int, samples: int, now: float, *,
             longest_seconds: float = 20.0) -> Standing:
    """Where the swarm stands for this peer, who is in `epoch` with `samples` of its own.

    What others have gathered since they wrote their record is reckoned from their speed, for `longest_seconds` after
    it (two of the longest refresh periods: who has written nothing since then may train no more). An archive counts for
    nothing but what it has.
    """
    others = _training(records, me)
    gathered = sum(_samples(record, now, longest_seconds) for record in others if record.epoch == epoch)
    own = next((record.sketch for record in records if record.peer_id == me and record.epoch == epoch), b"")
    theirs, _ = majority(records, epoch)
    return Standing(epoch=max([epoch, *(record.epoch for record in others)]), samples=samples + int(gathered),
                    peers=1 + len(others), minority=b"" not in (own, theirs) and own != theirs,
                    archived=max((record.epoch for record in records if record.state == ARCHIVING), default=0))


def next_reading(records: Sequence[PeerRecord], me: str, config: Averaging, now: float) -> float:
    """Seconds until the others' records are worth reading again: half of what is left of the epoch, within bounds."""
    own = next((record for record in records if record.peer_id == me), None)
    others = _training(records, me)
    if not others or own is None:
        return config.default_refresh_period
    longest = 2 * config.max_refresh_period
    mine = 0 if own.auxiliary else int(_samples(own, now, longest))
    there = standing(records, me, own.epoch, mine, now, longest_seconds=longest)
    speed = sum(record.samples_per_second for record in (own, *others) if record.epoch == own.epoch)
    left = config.target_batch_size - there.samples
    if there.epoch > own.epoch or left <= 0:
        return config.min_refresh_period
    seconds = left / speed / 2 if speed > 0 else config.max_refresh_period
    return min(max(seconds, config.min_refresh_period), config.max_refresh_period)


def telling_period(peers: int, config: Averaging) -> float:
    """Seconds at least between two tellings of a record that has changed, in a swarm of so many, this peer included.

    Others reckon from its speed meanwhile (`standing`); what they can't, a new epoch or state, is told at once.
    """
    return min(config.min_refresh_period * max(1.0, peers / FEW), config.max_refresh_period)


def majority(records: Sequence[PeerRecord], epoch: int) -> tuple[bytes, tuple[str, ...]]:
    """The sketch that more than half of the peers in `epoch` have, of those who tell one, and who has it, sorted.

    (b"", ()) if there is no such sketch.
    """
    sketches = {record.peer_id: record.sketch for record in records
                if record.state == "training" and record.epoch == epoch and record.sketch and not record.auxiliary}
    sketch, count = Counter(sketches.values()).most_common(1)[0] if sketches else (b"", 0)
    if 2 * count <= len(sketches):
        return b"", ()
    return sketch, tuple(sorted(peer for peer, theirs in sketches.items() if theirs == sketch))


def _training(records: Sequence[PeerRecord], me: str) -> list[PeerRecord]:
    """The others who train."""
    return [record for record in records
            if record.peer_id != me and record.state == "training" and not record.auxiliary]


def _samples(record: PeerRecord, now: float, longest_seconds: float) -> float:
    """Gathered by now, by all one knows."""
    return record.samples_accumulated + record.samples_per_second * min(max(0.0, now - record.time), longest_seconds)
