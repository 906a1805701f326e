"""`python -m benchmarks.faults [--rounds N] [--seed S] [--only WORD]`: one fault after another, and what survivors saw.

The cases, peers and checks are those of tests/swarm/test_faults.py; with `--cuts`, of tests/swarm/test_cut_network.py.
"""

import argparse
import os
import random
import sys
import tempfile
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "swarm")]

from fault_cases import CASES, CUTS, Row, strike  # noqa: E402
from faulty_peers import herd  # noqa: E402
from network import network  # noqa: E402


def main() -> None:
    """Print a line for each; end at the first that fails."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, help="all cases once, unless told otherwise")
    parser.add_argument("--cuts", action="store_true", help="of cables, in network namespaces; needs root")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--folder", help="for the peers' logs; it stays")
    parser.add_argument("--keep-going", action="store_true", help="count what fails")
    arguments = parser.parse_args()
    cases = [case for case in (CUTS if arguments.cuts else CASES) if arguments.only in str(case)]
    count = arguments.rounds or len(cases)
    draw = random.Random(arguments.seed)
    order = list(cases)
    while len(order) < count:
        order += draw.sample(cases, len(cases))
    rows, failures = list[Row](), 0
    with ExitStack() as stack:
        folder = Path(arguments.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="covey-faults-")))
        folder.mkdir(parents=True, exist_ok=True)
        swarm = stack.enter_context(herd(folder, stack.enter_context(network()) if arguments.cuts else None))
        for number, case in enumerate(order[:count], 1):
            began = datetime.now()
            try:
                row = strike(swarm, case)
            except AssertionError as error:
                failures += 1
                print(f"{number:4} {case!s:32} FAILED: {error}", flush=True)
                if not arguments.keep_going:
                    raise
                continue
            rows.append(row)
            back = f"{row.back:5.1f}" if row.back is not None else "    -"
            print(f"{number:4} {row.case:32} stall {row.stall:5.2f}  agreed {row.agreement:5.2f}  back {back}  "
                  f"equal after {row.equal_after}  {row.outcome}  ({(datetime.now() - began).total_seconds():.1f} s, "
                  f"load {os.getloadavg()[0]:.1f})", flush=True)
    print(f"{len(rows)} faults, {failures} failures; longest stall {max(row.stall for row in rows):.2f} s")


if __name__ == "__main__":
    main()
