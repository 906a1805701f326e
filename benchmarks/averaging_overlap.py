"""`python -m benchmarks.averaging_overlap`: what part of the time peers compute, with averaging in the background.

Strategy collaborative. What benchmarks/averaging_lanes.py says of micro-batches holds: computing is a timed wait, and
the writing of the gradients counts as computing. Their accumulation does not, nor does the update: both are made by
the processor here, by one thread.
"""

import averaging.fork  # noqa: F401

# isort: split
import argparse
from dataclasses import replace
from datetime import date

from rich.console import Console

from benchmarks.averaging_all_reduce import TENSORS, VALUES
from benchmarks.averaging_lanes import STOCK, Case, run
from benchmarks.averaging_seen import Seen
from benchmarks.averaging_tables import print_table, spread, verdict, wide_console

TURNS = 1
GOAL = 0.95
CASES = [  # name, swarm, epochs
    ("0.26 M values, 8 micro-batches of 0.1 s", Case("collaborative", 4), 8),
    ("25.56 M values, 4 micro-batches of 1 s",
     Case("collaborative", 2, values=VALUES, tensors=TENSORS, micro_batch_seconds=1.0, micro_batches=4), 3),
]


def compare(console: Console, turns: int = TURNS) -> None:
    """Measures, and prints a table."""
    rows = []
    for name, swarm, epochs in CASES:
        for side, overlap in (("collaborative", False), ("collaborative", True), (STOCK, True)):
            case = replace(swarm, side=side, options={"overlap": overlap})
            found = [run(case, epochs) for _ in range(turns)]
            shares = [1 - seen.waiting_share() for seen in found]
            is_goal = overlap and side != STOCK
            rows.append([name, str(swarm.peers), side, "on" if overlap else "off",
                         verdict(shares, GOAL, at_most=False, form=".3f") if is_goal else spread(shares),
                         spread([end.seconds for seen in found for end in seen.rounds()]), _failed(found)])
    print_table(console, f"covey overlap, {date.today()}: utilisation, that is the share of the time spent computing, "
                f"which is a timed wait in the place of a GPU's work; {turns} turns",
                ("epoch", "peers", "side", "overlap", f"utilisation, goal {GOAL}", "a round, s", "rounds that failed"),
                rows)


def _failed(found: list[Seen]) -> str:
    ends = [end for seen in found for end in seen.rounds()]
    return f"{sum(end.outcome != 'averaged' for end in ends)} of {len(ends)}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=TURNS)
    compare(wide_console(), parser.parse_args().turns)
