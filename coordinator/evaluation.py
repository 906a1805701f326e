"""How good a checkpoint of the archive is."""

from functools import cache
from pathlib import Path

import torch

from averaging.experiment import parse
from training.checkpoint import load_into, read_checkpoint
from training.data.config import Data
from training.data.open import open_source
from training.data.sources import Source
from training.evaluation import evaluate
from training.evaluation.features import check_classes
from training.objectives.objective import build_objective
from training.recipe import from_scratch


@cache
def images(data: Data, folder: Path | None) -> tuple[Source, Source]:
    """Those of train and val, opened once. Raises BadInput where they can't serve to evaluate."""
    train, val = (open_source(data, folder, split) for split in ("train", "val"))
    check_classes(train, val)
    return train, val


def evaluate_checkpoint(path: Path, folder: Path | None) -> dict[str, float]:
    """The figures of training.evaluation: k-NN, or of a classifier top-1, top-5 and loss. Raises BadInput."""
    checkpoint = read_checkpoint(path)
    experiment = parse(checkpoint.experiment)
    objective = build_objective(from_scratch(experiment))
    load_into(checkpoint, objective)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return evaluate(objective.to(device), *images(experiment.data, folder), experiment)
