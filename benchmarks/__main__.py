"""`make bench`: what the swarm costs, as ratios against the same loop without a swarm, measured in one run.

Every comparison is run in turns, rival and covey, rival and covey, so that a machine whose speed drifts slows both.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from time import monotonic

from rich.console import Console

from benchmarks import data_path, step
from benchmarks.lone_loop import BATCH, MEMORY_FORMAT

PAIRS = 3  # turns of each comparison
WINDOW_SECONDS = 12.0  # that each measurement lasts, from the end of an epoch to the end of an epoch
WARM_UP_EPOCHS = 1
DEADLINE_SECONDS = 180.0
TARGET = 16384  # samples per epoch and peer: about twelve seconds


@dataclass
class Lane:
    """One training process: what it trained on, and when."""

    process: subprocess.Popen[str]
    ends: list[tuple[float, int]] = field(default_factory=list)  # (seconds, samples) of every epoch

    def follow(self) -> None:
        """Read its JSON lines until it ends."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = json.loads(line)
            if event["event"] == "epoch":
                self.ends.append((monotonic(), event["own_samples"]))

    def rate(self) -> float:
        """Samples per second between the first and the last epoch's end after the warm-up."""
        (start, _), *rest = self.ends[WARM_UP_EPOCHS:]
        return sum(samples for _, samples in rest) / (rest[-1][0] - start)

    def epoch_seconds(self) -> float:
        """Mean length of its epochs."""
        ends = self.ends[WARM_UP_EPOCHS:]
        return (ends[-1][0] - ends[0][0]) / (len(ends) - 1)


@contextmanager
def running(arguments: Sequence[str], log: Path) -> Iterator[subprocess.Popen[str]]:
    """`python -m ARGUMENTS`, ended with the context."""
    with log.open("a") as errors:
        process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.PIPE, stderr=errors, text=True,
                                   env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"})
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def measure(commands: Sequence[Sequence[str]], folder: Path) -> list[Lane]:
    """Run `commands` at once until each has trained for WINDOW_SECONDS after its warm-up."""
    with ExitStack() as stack:
        lanes = [Lane(stack.enter_context(running(command, folder / "lanes.log"))) for command in commands]
        for lane in lanes:
            threading.Thread(target=lane.follow, daemon=True).start()
        deadline = monotonic() + DEADLINE_SECONDS
        while not all(len(lane.ends) > WARM_UP_EPOCHS + 1
                      and lane.ends[-1][0] - lane.ends[WARM_UP_EPOCHS][0] >= WINDOW_SECONDS for lane in lanes):
            if monotonic() > deadline or any(lane.process.poll() is not None for lane in lanes):
                raise SystemExit(f"a lane did not train; see {folder / 'lanes.log'}")
            threading.Event().wait(0.1)
    return lanes


def with_swarm(volunteers: int, overrides: Sequence[str], folder: Path) -> list[Lane]:
    """A coordinator and `volunteers` peers, as users start them."""
    local = ["--listen", "127.0.0.1", "--port", "0", "--http-port", "0", "--json"]
    with running(["peer.cli", "coordinator", "demo", *overrides, *local, "--grpc-port", "0", "--state-dir",
                  str(folder / "coordinator")], folder / "coordinator.log") as coordinator:
        assert coordinator.stdout is not None
        link = json.loads(coordinator.stdout.readline())["link"]
        return measure([["peer.cli", "join", link, *local, "--name", f"lane{number}", "--threads", "1",
                         "--batch-size", str(BATCH), "--memory-format", MEMORY_FORMAT,
                         "--state-dir", str(folder / f"lane{number}")] for number in range(volunteers)], folder)


def with_long_epochs(lanes: int) -> list[str]:
    """Of TARGET samples per peer; the demo's periods are made for epochs of a second."""
    return [f"averaging.target_batch_size={TARGET * lanes}", "averaging.min_refresh_period=2",
            "averaging.max_refresh_period=5"]


def compare(lanes: int, console: Console) -> None:
    """`lanes` peers in one swarm against as many lone loops at once."""
    ratios, lengths = [], []
    for turn in range(PAIRS):
        with tempfile.TemporaryDirectory(prefix="covey-bench-") as name:
            rival = measure([["benchmarks.lone_loop", "demo", f"averaging.target_batch_size={TARGET}"]] * lanes,
                            Path(name))
            ours = with_swarm(lanes, with_long_epochs(lanes), Path(name))
        ratios.append(sum(lane.rate() for lane in ours) / sum(lane.rate() for lane in rival))
        lengths.append(median(lane.epoch_seconds() for lane in ours))
        console.print(f"  turn {turn + 1}: swarm {sum(lane.rate() for lane in ours):7.1f} samples/s, "
                      f"lone {sum(lane.rate() for lane in rival):7.1f} samples/s, ratio {ratios[-1]:.3f}")
    plural = "s" * (lanes > 1)
    console.print(f"[bold]{lanes} peer{plural} / {lanes} lone loop{plural}: ratio {median(ratios):.3f}[/] "
                  f"({min(ratios):.3f} to {max(ratios):.3f}), epochs of {median(lengths):.1f} s")


def main() -> None:
    """All comparisons."""
    console = Console(highlight=False)
    console.print(f"covey bench, {date.today()}: samples/s with a swarm over samples/s without, recipe demo, "
                  f"one thread each, {PAIRS} turns", soft_wrap=True)
    for lanes in (1, 2):
        compare(lanes, console)
    data_path.compare(console)
    step.main()
    # forks peers, so it must not have threads of torch's
    subprocess.run([sys.executable, "-m", "benchmarks.averaging"], check=True,
                   env=dict(os.environ, OMP_NUM_THREADS="1"))


if __name__ == "__main__":
    main()
