"""What a peer says of itself to the swarm: plain data, so that it can be reasoned about without a network."""

from collections.abc import Mapping
from dataclasses import dataclass, field

PEER_MODES = ("direct", "client", "auxiliary")
PEER_STATES = ("starting", "training", "leaving")
ARCHIVING = "archiving"  # the state of a coordinator's record: it hands out checkpoints, and is no peer that one meets
# Why an all-reduce refuses (averaging/transports/swarm): for what was sent, or since a member was not there, or late.
BAD_VALUES = ("non-finite", "overflow", "misshapen", "oversize", "flood")
ABSENCES = ("silent", "short", "unreachable", "a group that is not known", "too many downloads at once")
AVERAGED = {"collaborative": "gradients", "local_sgd": "parameters", "diloco": "steps", "gossip": "parameters"}


@dataclass(frozen=True)
class Rounds:
    """Averaging rounds since the worker started, by outcome."""

    averaged: int = 0  # with at least one other peer
    failed: int = 0  # tried, and went on with what was here
    alone: int = 0  # nobody else in the swarm: nothing to average


@dataclass(frozen=True)
class RoundSeconds:
    """What those rounds took since the worker started, from the wish to average until the result, by outcome."""

    averaged: float = 0.0
    failed: float = 0.0


@dataclass(frozen=True)
class Refusals:
    """Contributions that the peer refused since its worker started, its own included, by the kind of reason."""

    value: int = 0  # what was sent can't be averaged (BAD_VALUES)
    absent: int = 0  # a member was gone, or came late (ABSENCES)
    message: int = 0  # forged, malformed, out of place, or of somebody without a good token

    def plus(self, reasons: Mapping[str, int]) -> "Refusals":
        """These, and as many more for each reason."""
        value = sum(reasons.get(reason, 0) for reason in BAD_VALUES)
        absent = sum(reasons.get(reason, 0) for reason in ABSENCES)
        message = sum(reasons.values()) - value - absent
        return Refusals(self.value + value, self.absent + absent, self.message + message)


@dataclass(frozen=True)
class PeerRecord:
    """One peer's progress record. Times are DHT time: Unix seconds."""

    peer_id: str  # libp2p's, base58
    name: str  # what the volunteer calls itself: untrusted text
    state: str  # one of PEER_STATES, or ARCHIVING
    epoch: int  # collaborative epoch; of an archive, that of its newest state
    samples_accumulated: int  # towards that epoch
    samples_total: int  # since the worker started
    samples_per_second: float
    loss: float | None  # mean over the last epoch it finished
    group_size: int  # peers in its last averaging round, itself included; 0 before the first
    version: str
    device: str
    client_mode: bool  # accepts no incoming connections
    time: float  # when it was written
    auxiliary: bool = False  # trains nothing, helps others to average
    step_seconds: float = 0.0  # that a micro-batch takes here, on average
    sketch: bytes = b""  # of its parameters (averaging/sketch.py); empty: unknown
    rounds: Rounds = field(default_factory=Rounds)
    round_seconds: float = 0.0  # that its last round with others took, or failed after; 0 before the first
    seconds: RoundSeconds = field(default_factory=RoundSeconds)
    refused: Refusals = field(default_factory=Refusals)
    addresses: tuple[str, ...] = ()  # multiaddresses at which newcomers can reach it

    @property
    def mode(self) -> str:
        """How it takes part: "auxiliary", "client" or "direct"."""
        return "auxiliary" if self.auxiliary else "client" if self.client_mode else "direct"


@dataclass(frozen=True)
class RoundEnd:
    """How one round of averaging ended for this peer."""

    kind: str  # what was averaged: "gradients", "parameters", "steps", ...
    outcome: str  # "averaged", "failed" or "alone"
    epoch: int  # the collaborative epoch that it ended
    group_size: int = 1  # this peer included
    seconds: float = 0.0  # from the wish to average until the result
    matchmaking_seconds: float = 0.0  # of these, until the group began to average
    bytes_sent: int = 0
    bytes_received: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)  # contributions refused, this peer's own included
    reason: str = ""  # why it failed


@dataclass(frozen=True)
class StateLoad:
    """How one download of the swarm's state ended."""

    epoch: int  # where this peer is now
    seconds: float
    succeeded: bool
