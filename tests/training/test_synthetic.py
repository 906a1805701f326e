"""What the synthetic set promises: hard for raw pixels, easy for a small supervised ResNet."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from training.data.config import Data, Synthetic
from training.data.open import open_source
from training.data.sources import MemorySource, Source
from training.data.synthetic import class_names, generate
from training.data.views import normalise
from training.evaluation import evaluate_pixels
from training.evaluation_config import Evaluation
from training.models.config import Trunk
from training.models.resnet import ResNet

Show = Callable[[str], None]
SIDE = 32


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    """Prints a figure that is worth a look even where the test passes."""
    def printed(line: str) -> None:
        with capsys.disabled():
            print(f"\n  synthetic set: {line}")
    return printed


@pytest.fixture(scope="module")
def splits() -> tuple[Source, Source]:
    data = Data(dataset="synthetic", image_size=SIDE)
    return open_source(data, None, "train"), open_source(data, None, "val")


def test_images_are_rgb_of_the_size_asked_for_and_classes_balanced() -> None:
    images, labels = generate(Synthetic(num_train=160), 40, "train")
    assert images.shape == (160, 3, 40, 40)
    assert images.dtype == torch.uint8
    assert labels.bincount().tolist() == [10] * 16


def test_classes_are_named_for_their_shape_and_texture() -> None:
    assert class_names(Synthetic(num_shapes=2, num_textures=2)) == (
        "disc, plain", "disc, stripes", "square, plain", "square, stripes")
    assert len(class_names(Synthetic())) == 16


def test_equal_seeds_give_equal_images() -> None:
    config = Synthetic(num_train=64)
    assert torch.equal(generate(config, 32, "train")[0], generate(config, 32, "train")[0])
    other = config.model_copy(update={"seed": 1})
    assert not torch.equal(generate(config, 32, "train")[0], generate(other, 32, "train")[0])


def test_train_and_val_share_no_image(splits: tuple[Source, Source]) -> None:
    train, val = ({image.numpy().tobytes() for image in everything(split)} for split in splits)
    assert len(train) == 4096
    assert len(val) == 1024
    assert not train & val


def test_colour_tells_nothing(splits: tuple[Source, Source]) -> None:
    """k-NN on the mean of each channel stays near one in sixteen."""
    def coloured(split: Source) -> MemorySource:
        images = everything(split).float()
        return MemorySource(images.mean(dim=(2, 3), keepdim=True).to(torch.uint8), split.labels)

    train, val = (coloured(split) for split in splits)
    assert evaluate_pixels(train, val, Evaluation(knn_k=20, resize_size=1, crop_size=1))["knn_accuracy"] < 0.15


@pytest.mark.parametrize("k", [1, 5, 20, 200])
def test_pixels_do_not_give_the_classes_away(splits: tuple[Source, Source], k: int, show: Show) -> None:
    accuracy = evaluate_pixels(*splits, Evaluation(knn_k=k, resize_size=SIDE, crop_size=SIDE))["knn_accuracy"]
    show(f"k-NN on raw pixels, k = {k}: {accuracy:.1%}")
    assert accuracy < 0.5


def test_small_supervised_resnet_finds_the_classes(splits: tuple[Source, Source], show: Show) -> None:
    torch.manual_seed(0)
    trunk = Trunk(depth=18, width_multiplier=0.25, stem="3x3/2")
    network = nn.Sequential(ResNet(trunk), nn.Linear(trunk.feature_width, 16))
    train, val = (normalise(everything(split)) for split in splits)
    fit(network, train, labels_of(splits[0]), passes=6)
    with torch.inference_mode():
        accuracy = (network.eval()(val).argmax(dim=1) == labels_of(splits[1])).float().mean().item()
    show(f"small supervised ResNet: {accuracy:.1%}")
    assert accuracy > 0.95


def everything(split: Source) -> Tensor:
    return split.images(range(len(split)), SIDE, SIDE)


def labels_of(split: Source) -> Tensor:
    assert split.labels is not None
    return split.labels


def fit(network: nn.Module, images: Tensor, labels: Tensor, passes: int) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=0.05)
    orders = [order for _ in range(passes) for order in torch.split(torch.randperm(len(images)), 64)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, len(orders))
    for order in orders:
        optimizer.zero_grad()
        cross_entropy(network(images[order]), labels[order]).backward()
        optimizer.step()
        schedule.step()
