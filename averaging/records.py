"""What a peer says of itself to the swarm: plain data, so that it can be reasoned about without a network."""

from dataclasses import dataclass, field

PEER_STATES = ("starting", "training", "leaving")


@dataclass(frozen=True)
class Rounds:
    """Averaging rounds since the worker started, by outcome."""

    averaged: int = 0  # with at least one other peer
    failed: int = 0  # tried, and went on with what was here
    alone: int = 0  # nobody else in the swarm: nothing to average


@dataclass(frozen=True)
class PeerRecord:
    """One peer's progress record. Times are DHT time: Unix seconds."""

    peer_id: str  # libp2p's, base58
    name: str  # what the volunteer calls itself: untrusted text
    state: str  # one of PEER_STATES
    epoch: int  # collaborative epoch
    samples_accumulated: int  # towards that epoch
    samples_total: int  # since the worker started
    samples_per_second: float
    loss: float | None  # mean over the last epoch it finished
    group_size: int  # peers in its last averaging round, itself included; 0 before the first
    version: str
    device: str
    client_mode: bool  # accepts no incoming connections
    time: float  # when it was written
    gradient_rounds: Rounds = field(default_factory=Rounds)
    state_rounds: Rounds = field(default_factory=Rounds)
    addresses: tuple[str, ...] = ()  # multiaddresses at which newcomers can reach it
