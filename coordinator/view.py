"""One view of the swarm for all who look: the gRPC snapshot, the JSON and the page have equal figures."""

from collections import Counter
from dataclasses import asdict, dataclass, field, is_dataclass
from itertools import islice
from math import isfinite
from typing import Any

from coordinator.archive import Archive, archive_view
from coordinator.credit_ledger import Leaderboard
from coordinator.swarm import Peer, SwarmState

INVITE = "INVITE"  # in a link for all to see, where one's own has to stand
MOST_ROWS = 50     # of the leaderboard
UNTOLD = {"time", "addresses", "sketch", "seconds", "client_mode", "auxiliary"}  # of a record
FRESH_SECONDS = 30.0  # older readings tell nothing of the swarm as it is


@dataclass(frozen=True)
class About:
    """What stays the same while a coordinator runs."""

    run_id: str
    link: str  # without an invite that is good for anything
    version: str
    target_batch_size: int  # samples per collaborative epoch
    target_group_size: int  # peers per averaging group
    averaged: str  # what peers average (averaging.records.AVERAGED)


@dataclass(frozen=True)
class Seen:
    """What a coordinator knows at one moment."""

    state: SwarmState = field(default_factory=SwarmState)
    archive: Archive | None = None  # None: it keeps none
    leaderboard: Leaderboard = field(default_factory=Leaderboard)


def is_fresh(state: SwarmState, now: float) -> bool:
    """Whether `state` still tells what the swarm does at `now` (Unix seconds)."""
    return now - state.time <= FRESH_SECONDS


def view(seen: Seen, about: About) -> dict[str, Any]:
    """The fields of `covey.v1.SwarmSnapshot`, by name."""
    state, leaderboard = seen.state, seen.leaderboard
    return {
        "run_id": about.run_id,
        "time_seconds": state.time,
        "epoch": state.epoch,
        "epoch_samples": state.epoch_samples,
        "target_batch_size": about.target_batch_size,
        "target_group_size": about.target_group_size,
        "samples_per_second": state.samples_per_second,
        "loss": state.loss,
        "group_size": state.group_size,
        "consensus_distance": state.consensus_distance,
        "samples_total": state.counters.samples,
        "peers": [_row(peer, state.time) for peer in state.peers.values()],
        "rounds": asdict(state.counters.rounds),
        "round_seconds": state.round_seconds,
        "seconds_in_rounds": asdict(state.counters.seconds),
        "refused": asdict(state.counters.refused),
        "since_seconds": state.since,
        "joins": state.joins,
        "departures": {"left": state.left, "lost": state.lost},
        "archive": archive_view(seen.archive),
        "leaderboard": [asdict(row) for row in islice(leaderboard.rows.values(), MOST_ROWS)],
        "credited_samples": leaderboard.samples,
        "flagged_claims": leaderboard.flagged,
    }


def swarm_json(seen: Seen, about: About, now: float) -> dict[str, Any]:
    """What `/api/swarm` and the page tell at `now` (Unix seconds): the view, and what one makes of it."""
    state = seen.state
    return {**view(seen, about), "link": about.link, "fresh": is_fresh(state, now),
            "peer_states": dict(Counter(peer.record.state for peer in state.peers.values())),
            "seconds_to_next_epoch": seconds_to_next_epoch(state, about.target_batch_size)}


def seconds_to_next_epoch(state: SwarmState, target_batch_size: int) -> float | None:
    """Until the samples that the next epoch still lacks are there, at the present speed, as of the reading; None while
    nothing trains. That they are averaged then takes longer is not in it."""
    if state.samples_per_second == 0:
        return None
    seconds = max(0, target_batch_size - state.epoch_samples) / state.samples_per_second
    return seconds if isfinite(seconds) else None  # a stranger may sign any speed, and JSON has no infinity


def _row(peer: Peer, now: float) -> dict[str, Any]:
    record = peer.record  # asdict() takes twenty times as long, and this is done a thousand times a second
    row = {name: dict(vars(value)) if is_dataclass(value) else value
           for name, value in vars(record).items() if name not in UNTOLD}
    return {**row, "mode": record.mode, "last_seen_seconds": now - peer.heard}
