"""One process of a world that goes through several runs: `python world_process.py FOLDER`, placed by its environment.

FOLDER/runs.json: a list of runs, each with a MASTER_PORT of its own.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from averaging.experiment import experiment_of
from peer import train as train_module
from peer.run_config import RunConfig
from peer.train import Course, train_alone
from training.loop import StepReport


def go(run: dict[str, Any], folder: Path) -> None:
    """One run; "leave": [rank, micro-batch] after which that process is told to leave."""
    os.environ["MASTER_PORT"] = str(run["port"])
    rank, report = int(os.environ["RANK"]), Course._report
    steps: list[int] = []

    def reporting(course: Course, each: StepReport) -> None:
        report(course, each)
        steps.append(each.local_step)
        if run.get("leave") == [rank, len(steps)]:
            os.kill(os.getpid(), signal.SIGTERM)

    train_module.Course._report = reporting  # type: ignore[method-assign]
    try:
        train_alone(experiment_of(run["experiment"]), RunConfig(
            run_dir=folder / run["name"], batch_size=8, device="cpu", memory_format="contiguous", threads=1, readers=1,
            **run["options"]), as_json=True)
    finally:
        train_module.Course._report = report  # type: ignore[method-assign]
    (folder / f"{run['name']}-{rank}.steps").write_text(json.dumps(steps))


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for run in json.loads((folder / "runs.json").read_text()):
        go(run, folder)


if __name__ == "__main__":
    main()
