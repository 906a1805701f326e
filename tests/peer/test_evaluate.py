"""`covey evaluate` judges the checkpoint it is given, on the images of its own experiment."""

from pathlib import Path

import pytest
import torch
from fake_coordinator import experiment

from averaging.experiment import canonical, fingerprint
from peer.evaluate import evaluate
from training.checkpoint import write_checkpoint
from training.errors import BadInput
from training.objectives.objective import build_objective
from training.optimizers.build import build_optimizer


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Of epochs 1 and 2; the later one is truncated."""
    torch.set_num_threads(1)
    trained = experiment("synthetic")
    objective = build_objective(trained)
    for epoch in (1, 2):
        path = write_checkpoint(tmp_path, epoch=epoch, experiment=canonical(trained), keep_last=2,
                                fingerprint=fingerprint(canonical(trained)), objective=objective,
                                optimizer=build_optimizer(trained.optimizer, objective.parameters()))
    path.write_bytes(path.read_bytes()[:-1])
    return tmp_path


def test_a_folder_means_its_newest_whole_checkpoint(checkpoints: Path) -> None:
    figures = evaluate(checkpoints, None)
    assert figures["checkpoint"] == str(checkpoints / "epoch-00000001.safetensors")
    assert (figures["epoch"], figures["train_images"]) == (1, 64)
    assert 0 < figures["knn_accuracy"] <= 1


def test_a_truncated_checkpoint_is_refused(checkpoints: Path) -> None:
    with pytest.raises(BadInput, match="epoch-00000002"):
        evaluate(checkpoints / "epoch-00000002.safetensors", None)


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no whole checkpoint"):
        evaluate(tmp_path, None)
