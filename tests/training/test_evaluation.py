"""k-NN against scikit-learn's, and its way with backbones and sources."""

import numpy as np
import pytest
import torch
from pictures import Pictures, bright_or_dark
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from training.config import validate
from training.data.transforms_config import Transforms
from training.errors import BadInput
from training.evaluation import evaluate_backbone, evaluate_pixels, extract_features, knn, knn_accuracy
from training.evaluation_config import Evaluation

CPU = torch.device("cpu")
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]


def clusters(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Five overlapping clusters of features [count, 16], and which each is from."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 5, (count,), generator=generator)
    return centres[labels] + 1.5 * torch.randn(count, 16, generator=generator), labels


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (20, 0.1), (200, 0.07), (200, 10.0)])
def test_knn_agrees_with_scikit_learn(k: int, temperature: float, device: str) -> None:
    (train, train_labels), (val, val_labels) = clusters(600, seed=1), clusters(500, seed=2)
    reference = KNeighborsClassifier(k, metric="cosine", algorithm="brute",
                                     weights=lambda distance: np.exp((1 - distance) / temperature))
    expected = reference.fit(train, train_labels).score(val, val_labels)
    accuracy = knn_accuracy(train, train_labels, val, val_labels, k=k, temperature=temperature,
                            device=torch.device(device))
    assert accuracy == pytest.approx(expected, abs=1e-9)
    assert 0.4 < accuracy < 0.9


@pytest.mark.parametrize("rows", [7, 150, 300])
def test_a_bank_searched_in_parts_votes_as_the_whole(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train, val = clusters(300, seed=1), clusters(200, seed=2)
    whole = knn_accuracy(*train, *val, k=20, temperature=0.1)
    monkeypatch.setattr(knn, "BANK_ROWS", rows)
    assert knn_accuracy(*train, *val, k=20, temperature=0.1) == whole


def test_length_of_features_does_not_matter() -> None:
    train, val = clusters(300, seed=1), clusters(200, seed=2)
    scaled = train[0] * torch.rand(300, 1).add(0.1), train[1]
    assert (knn_accuracy(*train, *val, k=10, temperature=0.1) == knn_accuracy(*scaled, *val, k=10, temperature=0.1))


def test_more_neighbours_than_images_means_all_of_them() -> None:
    train, val = clusters(30, seed=1), clusters(50, seed=2)
    assert knn_accuracy(*train, *val, k=30, temperature=0.1) == knn_accuracy(*train, *val, k=99, temperature=0.1)


class Watcher(nn.Module):
    """Averages over places, and remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        assert not self.norm.training
        assert images.dtype == torch.float32
        features: Tensor = self.norm(images).mean(dim=(2, 3))
        assert not features.requires_grad
        self.batches.append(len(images))
        return features


def test_backbone_runs_in_eval_mode_in_batches_and_is_left_as_it_was() -> None:
    backbone = Watcher()
    backbone.norm.eval()  # a norm that is frozen stays so
    scores = evaluate_backbone(backbone, bright_or_dark(20), bright_or_dark(10), Evaluation(knn_k=5, batch_size=8))
    assert scores == {"knn_accuracy": 1.0}
    assert backbone.batches == [8, 8, 4, 8, 2]
    assert (backbone.training, backbone.norm.training) == (True, False)
    assert torch.equal(backbone.norm.running_mean, torch.zeros(3))


def test_backbone_is_left_as_it_was_by_an_error_too() -> None:
    backbone, broken = Watcher(), bright_or_dark(10)
    broken.images = lambda *_: torch.zeros(3, 3, 0, 0, dtype=torch.uint8)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="expanded size"):
        evaluate_backbone(backbone, broken, broken, Evaluation())
    assert backbone.training


def test_images_are_resized_and_cropped_as_the_configs_say() -> None:
    source = bright_or_dark(10)
    config = Evaluation(knn_k=5, batch_size=8, resize_size=40, crop_size=32)
    evaluate_backbone(Watcher(), source, source, config, Transforms(interpolation="bicubic"))
    assert set(source.asked) == {(40, 32, "bicubic")}


def test_pixels_are_features_too() -> None:
    assert evaluate_pixels(bright_or_dark(20), bright_or_dark(10), Evaluation(knn_k=5)) == {"knn_accuracy": 1.0}


def test_channels_are_normalised_as_in_training() -> None:
    transforms = Transforms(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    features, _ = extract_features(nn.Flatten(), bright_or_dark(1), Evaluation(), CPU, transforms)
    assert features.unique().tolist() == pytest.approx([(20 / 255 - 0.5) / 0.25, (200 / 255 - 0.5) / 0.25])


def test_images_that_cannot_be_read_are_left_out() -> None:
    source = bright_or_dark(6)
    source.skipped[1] = "broken.png"
    features, labels = extract_features(nn.Flatten(), source, Evaluation(batch_size=4), CPU)
    assert features.shape == (5, 3 * 8 * 8)
    assert labels.tolist() == [0, 0, 1, 0, 1]


def test_images_without_classes_are_bad_input() -> None:
    unlabelled = Pictures(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), None)
    with pytest.raises(BadInput, match="without classes"):
        evaluate_backbone(Watcher(), unlabelled, unlabelled, Evaluation())


@pytest.mark.parametrize(("names", "stranger"), [(("first", "second", "third"), "'third'"), (None, "2")])
def test_a_class_that_only_val_has_is_bad_input(names: tuple[str, ...] | None, stranger: str) -> None:
    val = bright_or_dark(9)
    val.labels, val.classes = torch.arange(9) % 3, names
    with pytest.raises(BadInput, match=f"images of class {stranger} to evaluate on, and none to train on"):
        evaluate_backbone(Watcher(), bright_or_dark(9), val, Evaluation())


def test_equal_numbers_of_unlike_classes_are_bad_input() -> None:
    train, val = bright_or_dark(9), bright_or_dark(9)
    val.classes = ("first", "last")
    with pytest.raises(BadInput, match="'last'"):
        evaluate_backbone(Watcher(), train, val, Evaluation())


def test_a_crop_larger_than_the_image_is_bad_input() -> None:
    with pytest.raises(BadInput, match="crop_size of at most resize_size = 32"):
        validate(Evaluation, {"resize_size": 32, "crop_size": 33})
