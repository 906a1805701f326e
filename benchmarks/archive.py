"""What the archive costs a swarm: samples per second with a checkpoint of each epoch, over those without an archive.

    python -m benchmarks.archive

Two peers with a thread each, and a coordinator, on one machine: on two cores the archivist competes with both. Swarms
with and without take turns. Then, for how long a snapshot holds up the trainer that makes it.
"""

import tempfile
from datetime import date
from pathlib import Path
from statistics import median
from time import perf_counter

from rich.console import Console

from averaging.experiment import canonical, load_experiment
from benchmarks.__main__ import PAIRS, with_long_epochs, with_swarm
from coordinator.held import Held

SNAPSHOTS = {"demo": "demo", "ResNet-50, SwAV": "swav_1node_resnet_submit"}


def rate(every: int) -> tuple[float, int, float]:
    """Samples per second of two peers whose coordinator archives every so many epochs, the checkpoints written
    meanwhile, and the mean length of an epoch in seconds."""
    with tempfile.TemporaryDirectory(prefix="covey-bench-") as name:
        lanes = with_swarm(2, [*with_long_epochs(2), "--archive-every-epochs", str(every)], Path(name))
        written = (Path(name) / "coordinator.log").read_text().count("INFO checkpoint of epoch")
        return sum(lane.rate() for lane in lanes), written, median(lane.epoch_seconds() for lane in lanes)


def main() -> None:
    """Both tables."""
    console, ratios = Console(highlight=False), []
    console.print(f"covey archive, {date.today()}: recipe demo, two peers with a thread each, {PAIRS} turns")
    for turn in range(PAIRS):
        (without, *_), (archived, written, seconds) = rate(0), rate(1)
        ratios.append(archived / without)
        console.print(f"  turn {turn + 1}: {archived:7.1f} samples/s with {written} checkpoints, epochs of "
                      f"{seconds:.1f} s; {without:7.1f} without, ratio {ratios[-1]:.3f}")
    console.print(f"[bold]ratio {median(ratios):.3f}[/] ({min(ratios):.3f} to {max(ratios):.3f})")
    for name, recipe in SNAPSHOTS.items():
        held, times = Held(canonical(load_experiment(recipe))), []
        for _ in range(5):
            started = perf_counter()
            held.copy()
            times.append(perf_counter() - started)
        console.print(f"a snapshot holds its trainer for {1000 * median(times):.1f} ms ({1000 * min(times):.1f} to "
                      f"{1000 * max(times):.1f}): {name}, {held.most_bytes / 2**20:.0f} MiB, on the processor")


if __name__ == "__main__":
    main()
