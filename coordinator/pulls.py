"""When the archive takes a state of the swarm, from whom, and whether what came is the swarm's. Pure.

One hostile member among honest ones can't put a state of its own into the archive: its word on the epoch counts for no
more than a median allows, and where peers are equal at the end of an epoch, their majority's sketch must be that of
the state.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import dist, hypot, isfinite
from struct import calcsize, unpack

from averaging import roster
from averaging.config import Averaging
from averaging.records import PeerRecord
from averaging.transports.swarm.state import donors
from coordinator.swarm import SKETCH

SAME = 1e-3           # of the parameters' length: further apart, two sketches are not of one state
KEPT_SKETCHES = 64    # epochs
PATIENCE_SECONDS = 10.0  # that others have to reach the epoch of a state that is here


@dataclass(frozen=True)
class Wanted:
    """A state of `epoch` at least, from the first of `donors` that gives a good one."""

    epoch: int
    donors: tuple[str, ...]


def settled_epoch(records: Sequence[PeerRecord]) -> int | None:
    """The lower median of the epochs of those who train: half of them are there or further; None: nobody trains."""
    epochs = sorted(record.epoch for record in records if record.state == "training" and not record.auxiliary)
    return epochs[(len(epochs) - 1) // 2] if epochs else None


def wanted(records: Sequence[PeerRecord], me: str, held: int | None, every: int, config: Averaging) -> Wanted | None:
    """What to pull now, `held` being the newest epoch in the archive (None: nothing); None: nothing, as yet."""
    epoch, newest = settled_epoch(records), held or 0
    if epoch is None or epoch // every <= newest // every:
        return None
    credible = [record for record in records if record.epoch <= epoch + config.max_allowed_epoch_difference + 1]
    clients = [record.peer_id for record in credible  # who keep a connection to this node, as to all who are there
               if record.state == "training" and record.client_mode and record.epoch > newest]
    asked = (*donors(credible, me, newest + 1), *clients)
    return Wanted(newest + 1, asked) if asked else None


def with_majority(sketches: Mapping[int, bytes], records: Sequence[PeerRecord]) -> dict[int, bytes]:
    """The majorities' sketches by epoch, with those that `records` show."""
    epochs = {record.epoch for record in records if record.state == "training"}
    seen = {epoch: roster.majority(records, epoch)[0] for epoch in epochs}
    together = {**sketches, **{epoch: sketch for epoch, sketch in seen.items() if sketch}}
    return dict(sorted(together.items())[-KEPT_SKETCHES:])


def verdict(epoch: int, sketch: bytes, *, settled: int, sketches: Mapping[int, bytes], config: Averaging,
            waited: float) -> str | None:
    """Why a state of `epoch` with this sketch is not the swarm's; empty: it is; None: that is not known yet.

    `settled`: the highest `settled_epoch` of late; `waited`: seconds since the state came.
    """
    is_exact = config.strategy == "collaborative"  # otherwise peers differ within an epoch
    if epoch > settled + (0 if is_exact else config.max_allowed_epoch_difference):
        return None if waited < PATIENCE_SECONDS else f"it is of epoch {epoch}, and most who train are at {settled}"
    if is_exact and epoch in sketches:
        return "" if _are_near(sketch, sketches[epoch]) else f"it is not what most peers have in epoch {epoch}"
    return "" if waited >= PATIENCE_SECONDS or not is_exact else None


def _are_near(one: bytes, other: bytes) -> bool:
    if not len(one) == len(other) == calcsize(SKETCH):
        return False
    first, second = unpack(SKETCH, one), unpack(SKETCH, other)
    return all(map(isfinite, (*first, *second))) and dist(first, second) <= SAME * hypot(*second)
