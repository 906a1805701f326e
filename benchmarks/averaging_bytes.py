"""`python -m benchmarks.averaging_bytes`: what a peer sends per epoch, codec by codec, against the ideal.

The ideal is an all-reduce's 2 (n - 1) / n times the encoded gradients. "tensors" is what the rounds say that they sent;
"loopback" is what the loopback device carried, divided by the peers: tensors, the DHT, votes, acknowledgements and
headers of TCP and IP, and whatever else this machine does on loopback meanwhile.
"""

import averaging.fork  # noqa: F401

# isort: split
import argparse
from datetime import date
from statistics import mean

from hivemind.compression import Float16Compression
from rich.console import Console

from averaging.compression import CODECS, encoded_size
from benchmarks.averaging_lanes import STOCK, Case, run
from benchmarks.averaging_tables import print_table, wide_console

PEERS, VALUES = 4, 1 << 20
EPOCHS = 4


def compare(console: Console, epochs: int = EPOCHS) -> None:
    """Measures, and prints a table."""
    rows = [_row("collaborative", codec, epochs) for codec in CODECS]
    rows += [_row(STOCK, codec, epochs) for codec in ("none", "fp16")]
    print_table(console, f"covey bytes, {date.today()}: MB that a peer sends per epoch, {PEERS} peers, "
                f"{VALUES / 1e6:.2f} M float32, {epochs} epochs",
                ("side", "compression", "ideal", "tensors", "tensors / ideal", "loopback", "loopback / ideal"), rows)
    console.print("  ours averages gradients, and its state only where members differ; stock averages its state too, "
                  "in a round of its own each epoch, which the ideal leaves out", soft_wrap=True)


def _row(side: str, codec: str, epochs: int) -> list[str]:
    options = ({"compression": codec} if side != STOCK else
               {"grad_compression": Float16Compression(), "state_averaging_compression": Float16Compression()}
               if codec == "fp16" else {})
    seen = run(Case(side, PEERS, values=VALUES, micro_batches=5, options=options), epochs)
    ideal = 2 * (PEERS - 1) / PEERS * encoded_size(codec, VALUES)
    sent = mean(end.bytes_sent for end in seen.rounds())
    carried = seen.loopback_bytes() / PEERS
    told = ["", ""] if side == STOCK else [f"{sent / 1e6:.3f}", f"{sent / ideal:.3f}"]
    return [side, codec, f"{ideal / 1e6:.3f}", *told, f"{carried / 1e6:.3f}", f"{carried / ideal:.3f}"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    compare(wide_console(), parser.parse_args().epochs)
