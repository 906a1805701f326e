"""`covey evaluate`: how good the backbone of a checkpoint is."""

from pathlib import Path
from typing import Any

import torch

from averaging.experiment import parse
from training.checkpoint import load_into, newest_checkpoint, read_checkpoint
from training.data.sources import open_source
from training.errors import BadInput
from training.evaluation import evaluate_backbone
from training.objectives.objective import build_objective


def evaluate(path: Path, data: Path | None) -> dict[str, Any]:
    """k-NN accuracy of the checkpoint `path`, or of the newest one in that folder, on its experiment's images.

    `data` is the folder of images where the experiment asks for one. Raises BadInput.
    """
    path = _checkpoint_file(path)
    checkpoint = read_checkpoint(path)
    experiment = parse(checkpoint.experiment)
    train, val = (open_source(experiment.data, data, split) for split in ("train", "val"))
    objective = build_objective(experiment)
    load_into(checkpoint, objective)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    figures = evaluate_backbone(objective.backbone.to(device), train, val, experiment.evaluation)
    return {"checkpoint": str(path), "epoch": checkpoint.epoch, "train_images": len(train), "val_images": len(val),
            **figures}


def _checkpoint_file(path: Path) -> Path:
    newest = newest_checkpoint(path) if path.is_dir() else path
    if newest is None:
        raise BadInput(f"no whole checkpoint in {path}", expected="epoch-*.safetensors with its .json",
                       mend="Give the path of a checkpoint, or of a peer's checkpoints folder.")
    return newest
