"""`python -m benchmarks.averaging`: what averaging costs, beside stock hivemind and gloo; a part of `make bench`.

Each part is a module that runs alone, too. `python -m benchmarks.averaging_health`, which takes longer, is no part.
"""

import averaging.fork  # noqa: F401

# isort: split
from time import monotonic

from benchmarks import (
    averaging_accumulation,
    averaging_all_reduce,
    averaging_bytes,
    averaging_overlap,
    averaging_rounds,
)
from benchmarks.averaging_tables import wide_console

PARTS = (averaging_rounds, averaging_bytes, averaging_accumulation, averaging_overlap, averaging_all_reduce)


def main() -> None:
    """All parts."""
    console = wide_console()
    for part in PARTS:
        started = monotonic()
        part.compare(console)
        console.print(f"  {monotonic() - started:.0f} s for this table")


if __name__ == "__main__":
    main()
