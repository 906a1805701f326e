"""`covey evaluate`: how good the backbone of a checkpoint is, or its classifier."""

from pathlib import Path
from typing import Any

import torch

from peer.trained import open_trained
from training.data.open import open_source
from training.evaluation import evaluate as judge
from training.evaluation import linear_probe as probe

NAMES = {"knn_accuracy": "k-NN accuracy", "top1_accuracy": "top-1 accuracy", "top5_accuracy": "top-5 accuracy",
         "linear_probe_accuracy": "linear probe accuracy", "linear_probe_top5_accuracy": "linear probe top-5 accuracy"}


def evaluate(path: Path, data: Path | None, *, linear_probe: bool = False) -> dict[str, Any]:
    """Accuracies of the checkpoint `path`, or of the newest one in that folder, on its experiment's images.

    k-NN, or of a classifier top-1 and top-5; with `linear_probe`, that of its backbone too. `data` is the folder of
    images where the experiment asks for one. Raises BadInput.
    """
    trained = open_trained(path)
    experiment = trained.experiment
    train, val = (open_source(experiment.data, data, split) for split in ("train", "val"))
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    objective = trained.objective.to(device)
    figures = judge(objective, train, val, experiment)
    if linear_probe:
        figures |= probe(objective.backbone, train, val, experiment.evaluation, experiment.data.transforms)
    return {"checkpoint": str(trained.path), "epoch": trained.epoch, "train_images": len(train),
            "val_images": len(val), **figures}


def lines(figures: dict[str, Any]) -> str:
    """The figures for people."""
    return "\n".join([
        figures["checkpoint"],
        f"epoch {figures['epoch']}, on {figures['val_images']:,} images (and {figures['train_images']:,} to train on):",
        *(f"{name} {figures[key]:.1%}" for key, name in NAMES.items() if key in figures)])
