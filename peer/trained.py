"""A checkpoint opened for use: its experiment, and the objective as it was."""

from dataclasses import dataclass
from pathlib import Path

from averaging.experiment import Experiment, parse
from training.checkpoint import load_into, newest_checkpoint, read_checkpoint
from training.errors import BadInput
from training.objectives.objective import Objective, build_objective


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
    objective = build_objective(_from_scratch(experiment))
    load_into(checkpoint, objective)
    return Trained(path, checkpoint.epoch, experiment, objective)


def _from_scratch(experiment: Experiment) -> Experiment:
    """`experiment` without the file that its trunk began from, which may be gone: the checkpoint has all weights."""
    trunk = experiment.model.trunk.model_copy(update={"pretrained": ""})
    return experiment.model_copy(update={"model": experiment.model.model_copy(update={"trunk": trunk})})


def _checkpoint_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    newest = newest_checkpoint(path) or newest_checkpoint(path / "checkpoints")
    if newest is None:
        raise BadInput(f"no whole checkpoint in {path}", expected="epoch-*.safetensors with its .json",
                       mend="Give the path of a checkpoint, or of a peer's checkpoints folder.")
    return newest
