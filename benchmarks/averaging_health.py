"""`python -m benchmarks.averaging_health`: is every round of a healthy swarm whole? Ours beside stock hivemind's.

Four peers, a small model, no fault injected; the sides take turns, a fresh swarm of BLOCK epochs each time. Whether a
round was whole is not asked of the averagers: it is read off the gradients that the optimisers then step with, which
say in every row whose gradients are in them (benchmarks/averaging_lanes.py). Of stock only the gradient rounds are
judged, not those of its state.
"""

import averaging.fork  # noqa: F401

# isort: split
import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import date
from time import monotonic

from rich.console import Console

from benchmarks.averaging_lanes import STOCK, Case, run
from benchmarks.averaging_seen import WARM_UP_EPOCHS, Seen, Update
from benchmarks.averaging_tables import print_table, spread, wide_console

PEERS = 4
EPOCHS, BLOCK = 300, 50
LONGEST_BLOCK_SECONDS = 600.0
STALL_SECONDS = 2.0  # goal: no call of `step` longer than this
SAME = 1e-4  # shares that differ by less are equal: float32, added up in different orders


@dataclass
class Health:
    """What became of the epochs of one side. One epoch may count under several heads."""

    epochs: int = 0
    whole: int = 0     # all peers stepped with the same gradient, in which all of them are
    mixed: int = 0     # somebody's gradient was of other peers in one part of the tensors than in another
    apart: int = 0     # peers stepped with different gradients, each of them of one set of peers throughout
    fewer: int = 0     # all that stepped did so with the same gradient, and somebody's is missing
    failed: int = 0    # some peer's round failed by its own account
    left_out: int = 0  # some peer made no update of its own: it downloaded the state, or skipped the epoch
    stalled: int = 0   # some peer's `step` took longer than STALL_SECONDS

    def add(self, other: "Health") -> None:
        """Counts its epochs too."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


def judge(seen: Seen) -> Health:
    """What became of each epoch that was seen."""
    health = Health()
    updates = [{update.epoch: update for update in track.updates} for track in seen.tracks]
    for epoch in range(WARM_UP_EPOCHS, WARM_UP_EPOCHS + seen.epochs):
        found = [of_peer[epoch] for of_peer in updates if epoch in of_peer]
        health.add(_judge_epoch(found))
        health.failed += any(end.outcome != "averaged" and end.epoch == epoch
                             for track in seen.tracks for end in track.rounds)
        health.stalled += any(step.left - step.entered > STALL_SECONDS for track in seen.tracks
                              for step in track.steps if step.epoch == epoch + 1)
    return health


def _judge_epoch(found: Sequence[Update]) -> Health:
    is_mixed = any(_differ(update.lowest, update.highest) for update in found)
    are_apart = any(_differ(update.lowest, found[0].lowest) for update in found)
    is_missing = any(share < SAME for update in found for share in update.lowest[:PEERS])
    is_left_out = len(found) < PEERS
    return Health(epochs=1, mixed=is_mixed, apart=are_apart and not is_mixed, left_out=is_left_out,
                  fewer=is_missing and not (is_mixed or are_apart),
                  whole=not (is_mixed or are_apart or is_missing or is_left_out))


def _differ(one: Sequence[float], other: Sequence[float]) -> bool:
    return any(abs(a - b) > SAME for a, b in zip(one, other, strict=True))


def compare(console: Console, epochs: int = EPOCHS, block: int = BLOCK) -> None:
    """Measures, and prints a table."""
    sides = ("collaborative", STOCK)
    health, latencies = {side: Health() for side in sides}, {side: list[float]() for side in sides}
    longest, seconds = dict.fromkeys(sides, 0.0), dict.fromkeys(sides, 0.0)
    while health[STOCK].epochs < epochs:
        for side in sides:
            started = monotonic()
            seen = run(Case(side, PEERS, micro_batches=5), block, noting=True, seconds=LONGEST_BLOCK_SECONDS)
            health[side].add(judge(seen))
            latencies[side] += seen.latencies()
            longest[side] = max(longest[side], *(
                step.left - step.entered for track in seen.tracks for step in track.steps
                if step.epoch > WARM_UP_EPOCHS))
            seconds[side] += monotonic() - started
        console.print(f"  {side_by_side(health)}", soft_wrap=True)
    print_table(console, f"covey health, {date.today()}: {PEERS} peers, {Case(STOCK, 0).values / 1e6:.2f} M float32; "
                f"goal: all whole, none stalled",
                ("side", *(each.name.replace("_", " ") for each in fields(Health)), "longest step, s",
                 "end of an epoch, s", "95 %", "took, s"),
                [[side, *(str(getattr(health[side], each.name)) for each in fields(Health)), f"{longest[side]:.2f}",
                  spread(latencies[side]), f"{_percentile(latencies[side]):.3f}", f"{seconds[side]:.0f}"]
                 for side in sides])
    ours = health["collaborative"]
    reached = ours.whole == ours.epochs and not ours.stalled
    console.print(f"  goal {'reached' if reached else 'MISSED'} by ours")


def side_by_side(health: dict[str, Health]) -> str:
    """So far."""
    return "; ".join(f"{side}: {found.whole} of {found.epochs} whole, {found.stalled} stalled"
                     for side, found in health.items())


def _percentile(values: Sequence[float]) -> float:
    return sorted(values)[int(0.95 * len(values))] if values else float("nan")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--block", type=int, default=BLOCK, help="epochs of one swarm")
    arguments = parser.parse_args()
    compare(wide_console(), arguments.epochs, arguments.block)
