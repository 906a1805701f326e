"""Top-1, top-5 and loss of classifiers against scikit-learn's, and pooling over processes."""

from collections.abc import Callable

import pytest
import torch
from pictures import Pictures, bright_or_dark, noise
from sklearn.metrics import log_loss, top_k_accuracy_score
from torch import Tensor, nn

from training.config import validate
from training.data.views import normalise
from training.errors import BadInput
from training.evaluation import evaluate, evaluate_classifier
from training.evaluation.classifier import figures, sums
from training.evaluation_config import Evaluation
from training.objectives.objective import build_objective
from training.recipe import ClassificationTraining, SwavTraining

CONFIG = Evaluation(batch_size=16)


class Guess(nn.Module):
    """A classifier by chance: a fixed linear map of the pixels."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.linear = nn.Linear(48, classes)

    def predict(self, images: Tensor) -> Tensor:
        assert not self.norm.training
        logits: Tensor = self.linear(self.norm(images).flatten(1))
        assert not logits.requires_grad
        return logits


@pytest.fixture
def guess() -> Callable[[int], Guess]:
    torch.manual_seed(0)
    return Guess


def test_agrees_with_scikit_learn(guess: Callable[[int], Guess]) -> None:
    classifier, val = guess(10), noise(200, 10)
    scores = evaluate_classifier(classifier, val, CONFIG)
    assert classifier.norm.training
    classifier.eval()
    with torch.inference_mode():
        images = normalise(val.images(range(200), 4, 4))
        logits = classifier.predict(images).double()
    assert val.labels is not None
    assert scores == pytest.approx({
        "top1_accuracy": top_k_accuracy_score(val.labels, logits, k=1, labels=range(10)),
        "top5_accuracy": top_k_accuracy_score(val.labels, logits, k=5, labels=range(10)),
        "val_loss": log_loss(val.labels, logits.softmax(1))}, rel=1e-5)
    assert 0 < scores["top1_accuracy"] < scores["top5_accuracy"] < 1


def test_processes_that_share_the_images_come_to_the_same(guess: Callable[[int], Guess]) -> None:
    classifier, val = guess(10), noise(101, 10)
    shares = [sums(classifier, val, range(rank, len(val), 3), CONFIG) for rank in range(3)]
    assert [int(share[0]) for share in shares] == [34, 34, 33]
    assert figures(sum(shares)) == pytest.approx(evaluate_classifier(classifier, val, CONFIG), rel=1e-6)


def test_images_that_cannot_be_read_do_not_count(guess: Callable[[int], Guess]) -> None:
    classifier, val = guess(10), noise(100, 10)
    assert val.labels is not None
    kept = [number for number in range(100) if number not in (3, 50)]
    without = Pictures(val.images(kept, 4, 4), val.labels[kept])
    val.skipped.update({3: "a.png", 50: "b.png"})
    expected = evaluate_classifier(classifier, without, CONFIG)
    assert evaluate_classifier(classifier, val, CONFIG) == pytest.approx(expected, rel=1e-6)


def test_nothing_to_read_is_bad_input(guess: Callable[[int], Guess]) -> None:
    val = noise(3, 3)
    val.skipped.update(dict.fromkeys(range(3), "broken.png"))
    with pytest.raises(BadInput, match="no image to evaluate on"):
        evaluate_classifier(guess(3), val, CONFIG)


def test_with_four_classes_the_first_five_are_all(guess: Callable[[int], Guess]) -> None:
    assert evaluate_classifier(guess(4), noise(40, 4), CONFIG)["top5_accuracy"] == 1


def test_images_without_classes_are_bad_input(guess: Callable[[int], Guess]) -> None:
    val = noise(20, 5)
    val.labels = None
    with pytest.raises(BadInput, match="without classes"):
        evaluate_classifier(guess(5), val, CONFIG)


def test_more_classes_than_the_classifier_has_are_bad_input(guess: Callable[[int], Guess]) -> None:
    with pytest.raises(BadInput, match=r"images of 6 classes.*at most 5"):
        evaluate_classifier(guess(5), noise(20, 6), CONFIG)


SMALL = Evaluation(knn_k=5, resize_size=8, crop_size=8)
SUPERVISED = {
    "name": "tiny", "objective": "classification",
    "model": {"trunk": {"depth": 18, "width_multiplier": 0.125, "stem": "3x3"}},
    "data": {"dataset": "image_folder", "num_classes": 2, "transforms": "cifar10_train"},
    "optimizer": {"lr": 0.1, "max_epochs": 10}, "evaluation": SMALL.model_dump(),
}


def test_a_run_is_followed_by_what_suits_its_objective(tiny: Callable[..., SwavTraining]) -> None:
    swav, supervised = tiny(), validate(ClassificationTraining, SUPERVISED)
    train, val = bright_or_dark(20), bright_or_dark(10)
    classifier = build_objective(supervised)
    figures_of_classifier = evaluate(classifier, train, val, supervised)
    assert figures_of_classifier == evaluate_classifier(classifier, val, SMALL, supervised.data.transforms)
    assert figures_of_classifier.keys() == {"top1_accuracy", "top5_accuracy", "val_loss"}
    assert evaluate(build_objective(swav), train, val, swav) == {"knn_accuracy": 1.0}
