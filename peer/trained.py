"""A checkpoint opened for use: its experiment, and the objective as it was."""

from dataclasses import dataclass
from pathlib import Path

from averaging.experiment import Experiment, parse
from training.checkpoint import load_into, newest_checkpoint, read_checkpoint
from training.errors import BadInput
from training.objectives.objective import Objective, build_objective
from training.recipe import from_scratch


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds, on the CPU."""

    path: Path
    epoch: int
    experiment: Experiment
    objective: Objective


def open_trained(path: Path) -> Trained:
    """The checkpoint `path`, or the newest whole one in that folder or its checkpoints/. Raises BadInput."""
    path = _checkpoint_file(path)
    checkpoint = read_checkpoint(path)
    experiment = parse(checkpoint.experiment)
    objective = build_objective(from_scratch(experiment))
    load_into(checkpoint, objective)
    return Trained(path, checkpoint.epoch, experiment, objective)


def _checkpoint_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    newest = newest_checkpoint(path) or newest_checkpoint(path / "checkpoints")
    if newest is None:
        raise BadInput(f"no whole checkpoint in {path}", expected="epoch-*.safetensors with its .json",
                       mend="Give the path of a checkpoint, or of a peer's checkpoints folder.")
    return newest
