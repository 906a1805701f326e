"""k-NN against scikit-learn's, and its way with backbones and sources."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from training.data.sources import MemorySource
from training.errors import BadInput
from training.evaluation import evaluate_backbone, evaluate_pixels, extract_features, knn_accuracy
from training.evaluation_config import Evaluation

CPU = torch.device("cpu")


def clusters(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Five overlapping clusters of features [count, 16], and which each is from."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 5, (count,), generator=generator)
    return centres[labels] + 1.5 * torch.randn(count, 16, generator=generator), labels


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (20, 0.1), (200, 0.07), (200, 10.0)])
def test_knn_agrees_with_scikit_learn(k: int, temperature: float) -> None:
    (train, train_labels), (val, val_labels) = clusters(600, seed=1), clusters(500, seed=2)
    reference = KNeighborsClassifier(k, metric="cosine", algorithm="brute",
                                     weights=lambda distance: np.exp((1 - distance) / temperature))
    expected = reference.fit(train, train_labels).score(val, val_labels)
    accuracy = knn_accuracy(train, train_labels, val, val_labels, k=k, temperature=temperature)
    assert accuracy == pytest.approx(expected, abs=1e-9)
    assert 0.4 < accuracy < 0.9


def test_length_of_features_does_not_matter() -> None:
    train, val = clusters(300, seed=1), clusters(200, seed=2)
    scaled = train[0] * torch.rand(300, 1).add(0.1), train[1]
    assert (knn_accuracy(*train, *val, k=10, temperature=0.1) == knn_accuracy(*scaled, *val, k=10, temperature=0.1))


def test_more_neighbours_than_images_means_all_of_them() -> None:
    train, val = clusters(30, seed=1), clusters(50, seed=2)
    assert knn_accuracy(*train, *val, k=30, temperature=0.1) == knn_accuracy(*train, *val, k=99, temperature=0.1)


def bright_or_dark(count: int) -> MemorySource:
    """Images of two classes that differ in the brightness of a channel of their own."""
    labels = torch.arange(count) % 2
    images = torch.full((count, 3, 8, 8), 20, dtype=torch.uint8)
    images[torch.arange(count), labels] = 200
    return MemorySource(images, labels)


class Watcher(nn.Module):
    """Averages over places, and remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        assert images.dtype == torch.float32
        self.batches.append(len(images))
        return images.mean(dim=(2, 3))


def test_backbone_runs_in_eval_mode_in_batches_and_is_left_as_it_was() -> None:
    backbone = Watcher()
    scores = evaluate_backbone(backbone, bright_or_dark(20), bright_or_dark(10), Evaluation(knn_k=5, batch_size=8))
    assert scores == {"knn_accuracy": 1.0}
    assert backbone.batches == [8, 8, 4, 8, 2]
    assert backbone.training
    assert evaluate_backbone(backbone.eval(), bright_or_dark(20), bright_or_dark(10), Evaluation()) == scores
    assert not backbone.training


def test_pixels_are_features_too() -> None:
    assert evaluate_pixels(bright_or_dark(20), bright_or_dark(10), Evaluation(knn_k=5)) == {"knn_accuracy": 1.0}


def test_images_that_cannot_be_read_are_left_out() -> None:
    source = bright_or_dark(6)
    source.skipped[1] = "broken.png"
    features, labels = extract_features(nn.Flatten(), source, 4, CPU)
    assert features.shape == (5, 3 * 8 * 8)
    assert labels.tolist() == [0, 0, 1, 0, 1]


def test_images_without_classes_are_bad_input() -> None:
    unlabelled = MemorySource(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), None)
    with pytest.raises(BadInput, match="without classes"):
        evaluate_backbone(Watcher(), unlabelled, unlabelled, Evaluation())
