from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from training.config import override, validate
from training.errors import BadInput
from training.objectives.classification import Classification
from training.objectives.objective import build_objective
from training.recipe import ClassificationTraining

Tiny = Callable[..., ClassificationTraining]
TINY = {
    "name": "tiny-classifier", "objective": "classification",
    "model": {"trunk": {"depth": 18, "width_multiplier": 0.125, "stem": "3x3"}},
    "data": {"num_classes": 5, "transforms": {"total_num_crops": 1, "num_crops": [1], "size_crops": [16],
                                              "crop_scales": [[0.08, 1.0]]}},
    "optimizer": {"lr": 0.1, "max_epochs": 10},
}
LABELS = torch.tensor([0, 4, 4, 1, 2, 3])


@pytest.fixture
def tiny() -> Tiny:
    return lambda *overrides: validate(ClassificationTraining, override(TINY, overrides))


def build(training: ClassificationTraining) -> Classification:
    objective = build_objective(training, batch_size=len(LABELS))
    assert isinstance(objective, Classification)
    return objective


def images(side: int = 16) -> Tensor:
    return torch.randn(len(LABELS), 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_cross_entropy_with_smoothed_labels(tiny: Tiny, smoothing: float) -> None:
    objective = build(tiny(f"loss.label_smoothing={smoothing}"))
    loss, _ = objective([images()], LABELS, epoch=0)
    target = functional.one_hot(LABELS, 5) * (1 - smoothing) + smoothing / 5
    likelihood = objective.predict(images()).log_softmax(1)
    torch.testing.assert_close(loss, -(target * likelihood).sum(1).mean())


def test_accuracy_is_the_share_of_images_whose_likeliest_class_is_theirs(tiny: Tiny) -> None:
    objective = build(tiny())
    predicted = objective.predict(images()).argmax(1)
    _, metrics = objective([images()], torch.cat([predicted[:4], (predicted[4:] + 1) % 5]), epoch=0)
    assert {name: value.item() for name, value in metrics.items()} == {"train_top1_accuracy": pytest.approx(4 / 6)}


def test_prediction_is_linear_in_the_features_of_the_backbone(tiny: Tiny) -> None:
    objective = build(tiny()).eval()
    features = objective.backbone(images())
    assert features.shape == (6, 64)
    torch.testing.assert_close(objective.predict(images()), objective.classifier(features))


def test_images_without_classes_are_refused(tiny: Tiny) -> None:
    with pytest.raises(BadInput, match="images without classes; expected one folder per class"):
        build(tiny())([images()], None, epoch=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_is_float32_under_autocast(tiny: Tiny, dtype: torch.dtype) -> None:
    objective = build(tiny("loss.label_smoothing=0.1"))
    expected, _ = objective([images()], LABELS, epoch=0)
    with torch.autocast("cpu", dtype):
        loss, _ = objective([images()], LABELS, epoch=0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("trunk", "side", "width"), [
    ({"name": "lenet"}, 32, 84), ({"name": "regnet_y_400mf"}, 32, 440),
    ({"name": "torchvision:squeezenet1_1"}, 64, 512)])
def test_any_trunk_gets_a_classifier_of_its_width(tiny: Tiny, trunk: dict[str, Any], side: int, width: int) -> None:
    training = validate(ClassificationTraining, TINY | {"model": {"trunk": trunk}})
    objective = build(training)
    assert (objective.classifier.in_features, objective.classifier.out_features) == (width, 5)
    loss, _ = objective([images(side)], LABELS, epoch=0)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())


def test_what_peers_share_are_the_running_statistics_and_nothing_else(tiny: Tiny) -> None:
    objective = build(tiny())
    norms = [module for module in objective.modules() if isinstance(module, nn.BatchNorm2d)]
    shared = list(objective.shared_buffers())
    assert [id(buffer) for buffer in shared] == [id(buffer) for norm in norms
                                                 for buffer in (norm.running_mean, norm.running_var)]
    assert objective.local_state() == {}
    assert objective.write_dump() is None


def test_a_few_images_are_learnt_by_heart(tiny: Tiny) -> None:
    objective = build(tiny())
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.05, momentum=0.9)
    for _ in range(15):
        loss, metrics = objective([images()], LABELS, epoch=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert metrics["train_top1_accuracy"] == 1
    assert loss < 0.1
