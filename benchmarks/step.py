"""`python -m benchmarks.step`: one SwAV step of covey's against a plain loop with lightly's modules.

"lightly" runs the trunk once per crop, as lightly's documentation does; "lightly/size" once per size, as covey does.
Same trunk, head, crops, batch, optimiser, threads. Every side is a process of its own and they step in turns, so that a
machine whose speed drifts slows all. Ratios in processor time stand beside those in time: with OMP_NUM_THREADS=1 they
hold on a busy machine too. Goals: 1.1 times lightly's images/s in float32, 1.7 with bf16.
"""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import date
from statistics import median
from typing import Any

import torch
from rich.console import Console

from benchmarks.step_lane import Case

TURNS = 3
SIDES = (("lightly", False), ("lightly/size", False), ("covey", False), ("lightly/size", True), ("covey", True))
PRECISION = {False: "float32", True: "bf16"}
# depth, crops, their sizes, and a batch small enough for some twenty seconds on two cores
CASES = ((18, (2, 4), (96, 48), 16), (50, (2, 4), (96, 48), 8), (18, (2, 6), (224, 96), 4), (50, (2, 6), (224, 96), 4))


@dataclass
class Lane:
    """One side's process, and its steps so far."""

    process: subprocess.Popen[str]
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    peak_bytes: int = 0

    def answer(self) -> dict[str, Any]:
        """Its next line of JSON."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a lane ended early; its error is above")
        return dict(json.loads(line))

    def step(self) -> None:
        """Have it make a step."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        answer = self.answer()
        self.seconds.append(answer["seconds"])
        self.cpu_seconds.append(answer["cpu_seconds"])
        self.parts.append(answer["parts"])

    def end(self) -> None:
        """Have it end, and say how much memory it took."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.peak_bytes = self.answer()["peak_bytes"]


def measure(depth: int, num_crops: tuple[int, int], size_crops: tuple[int, int], batch: int) -> list[Lane]:
    """The sides' lanes after TURNS turns."""
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with ExitStack() as stack:
        lanes = []
        for side, bf16 in SIDES:
            case = Case(side, bf16, depth, num_crops, size_crops, batch, device, threads)
            process = stack.enter_context(subprocess.Popen(
                [sys.executable, "-m", "benchmarks.step_lane", json.dumps(asdict(case))], text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            stack.callback(process.kill)
            lanes.append(Lane(process))
            lanes[-1].answer()  # built and warmed up, while the others wait
        for _ in range(TURNS):
            for lane in lanes:
                lane.step()
        for lane in lanes:
            lane.end()
    return lanes


def show(case: tuple[int, tuple[int, int], tuple[int, int], int], lanes: list[Lane], console: Console) -> None:
    """Each side's rate and memory, the ratios, and where covey's time goes."""
    depth, (large, small), (large_size, small_size), batch = case
    console.print(f"[bold]ResNet-{depth}, {large}x{large_size}+{small}x{small_size}, batch {batch}[/]")
    by_side = dict(zip(SIDES, lanes, strict=True))
    for (side, bf16), lane in by_side.items():
        parts = where_time_goes(lane) if side == "covey" else ""
        console.print(f"  {side:13}{PRECISION[bf16]:8} {batch / median(lane.seconds):7.2f} images/s, peak "
                      f"{lane.peak_bytes / 2**20:6.0f} MiB{parts}", soft_wrap=True)
    for bf16, rival, goal in ((False, ("lightly", False), 1.1), (False, ("lightly/size", False), 1.1),
                              (True, ("lightly", False), 1.7), (True, ("lightly/size", False), 1.7),
                              (True, ("lightly/size", True), 1.1)):
        mine, theirs = by_side["covey", bf16], by_side[rival]
        ratios = [slow / fast for slow, fast in zip(theirs.seconds, mine.seconds, strict=True)]
        in_cpu_time = sum(theirs.cpu_seconds) / sum(mine.cpu_seconds)
        console.print(f"  covey {PRECISION[bf16]} / {rival[0]} {PRECISION[rival[1]]}: ratio {median(ratios):.2f} "
                      f"({min(ratios):.2f} to {max(ratios):.2f}), in processor time {in_cpu_time:.2f}, goal {goal}",
                      soft_wrap=True)


def where_time_goes(lane: Lane) -> str:
    """The parts of the step as shares of it."""
    mean = {part: sum(parts[part] for parts in lane.parts) / sum(lane.seconds) for part in lane.parts[0]}
    mean["head and loss"] = mean.pop("trunk, head, loss") - mean["trunk"]
    return ": " + ", ".join(f"{part} {mean[part]:.0%}" for part in ("trunk", "head and loss", "backward", "update"))


def main() -> None:
    """All cases."""
    console = Console(highlight=False)
    console.print(f"covey step, {date.today()}: images/s of a step (forward, loss, backward, update) beside lightly's, "
                  f"{TURNS} turns, {torch.get_num_threads()} threads",
                  soft_wrap=True)
    for case in CASES:
        show(case, measure(*case), console)


if __name__ == "__main__":
    main()
