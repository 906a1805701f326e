"""`python -m benchmarks.averaging_rounds`: what a round takes, strategy by strategy, beside stock hivemind.Optimizer.

A turn is a fresh swarm per side, one after the other, as long as it takes for EPOCHS collaborative epochs. What
benchmarks/averaging_lanes.py says of micro-batches holds: computing is a timed wait.
"""

import averaging.fork  # noqa: F401

# isort: split
import argparse
from datetime import date
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks.averaging_lanes import STOCK, Case, run
from benchmarks.averaging_seen import Seen
from benchmarks.averaging_tables import print_table, spread, verdict, wide_console
from benchmarks.stock_hivemind import MATCHMAKING_SECONDS

TURNS = 2
EPOCHS = 6
GOAL = 0.2  # of stock's latency
OURS: dict[str, dict[str, Any]] = {
    "collaborative": {}, "local_sgd": {}, "diloco": {}, "gossip": {"topology": "one-peer-exp"}}


def measure(peers: int, turns: int, matchmaking: float) -> dict[str, list[Seen]]:
    """What was seen of every side, a swarm per turn."""
    stock = {"matchmaking_time": matchmaking}
    seen: dict[str, list[Seen]] = {side: [] for side in (STOCK, *OURS)}
    for _ in range(turns):
        for side, found in seen.items():
            found.append(run(Case(side, peers, options=OURS.get(side, stock)), EPOCHS))
    return seen


def compare(console: Console, turns: int = TURNS, matchmaking: float = MATCHMAKING_SECONDS) -> None:
    """Measures, and prints a table."""
    rows = []
    for peers in (2, 4):
        seen = measure(peers, turns, matchmaking)
        for side, found in seen.items():
            rows.append([str(peers), side, *_cells(found), *(
                ("", "") if side == STOCK else _ratios(found, seen[STOCK]))])
    case = Case(STOCK, 0)
    print_table(
        console, f"covey rounds, {date.today()}: {case.values / 1e6:.2f} M float32 in {case.tensors} tensors, "
        f"loopback, epochs of {case.micro_batches} micro-batches of {case.micro_batch_seconds} s, which are timed "
        f"waits in the place of a GPU's work; {turns} turns of {EPOCHS} epochs",
        ("peers", "side", "end of an epoch, s: median (range)", "epoch, s", "time not computing", "samples / target",
         "rounds that failed", f"latency / stock's, goal {GOAL}", "time not computing / stock's"), rows)
    console.print("  end of an epoch: from when the last peer is there until all have made the update; "
                  "diloco with one fragment and no delay, gossip with pairs that change (one-peer-exp)", soft_wrap=True)


def _cells(found: list[Seen]) -> list[str]:
    target = len(found[0].tracks) * Case(STOCK, 0).micro_batches
    failed = sum(end.outcome != "averaged" for seen in found for end in seen.rounds())
    return [spread([latency for seen in found for latency in seen.latencies()]),
            f"{median(seen.epoch_seconds() for seen in found):.2f}", f"{_waiting(found):.1%}",
            f"{median(seen.samples() for seen in found) / target:.2f}",
            f"{failed} of {sum(len(seen.rounds()) for seen in found)}"]


def _ratios(ours: list[Seen], stock: list[Seen]) -> tuple[str, str]:
    latencies = [median(mine.latencies()) / median(theirs.latencies()) for mine, theirs in zip(ours, stock, strict=True)
                 if mine.latencies() and theirs.latencies()]
    waiting = [_seconds_not_computing(mine) / _seconds_not_computing(theirs)
               for mine, theirs in zip(ours, stock, strict=True)]
    return verdict(latencies, GOAL, at_most=True), spread(waiting)


def _waiting(found: list[Seen]) -> float:
    return median(seen.waiting_share() for seen in found)


def _seconds_not_computing(seen: Seen) -> float:
    return seen.waiting_share() * seen.epoch_seconds()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--matchmaking", type=float, default=MATCHMAKING_SECONDS, help="stock's, in seconds")
    arguments = parser.parse_args()
    compare(wide_console(), arguments.turns, arguments.matchmaking)
