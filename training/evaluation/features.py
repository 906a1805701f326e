"""Features of labelled images, and what every evaluation asks of its images."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from training.data.sources import Source
from training.data.transforms_config import Transforms
from training.data.views import normalise
from training.errors import BadInput
from training.evaluation_config import Evaluation

Labelled = tuple[Tensor, Tensor]  # features float32 [N, F], classes int64 [N]; on the CPU
Splits = tuple[Labelled, Labelled]  # of train and of val
IMAGENET = Transforms()  # whose mean and deviation are what most recipes take out


def backbone_features(backbone: nn.Module, train: Source, val: Source, config: Evaluation,
                      transforms: Transforms = IMAGENET) -> Splits:
    """What `backbone`, images float32 [B, 3, S, S] -> [B, F], makes of both splits on its own device.

    It is run in eval mode; each module is left in the mode it was in. `transforms` says how images are
    resized and normalised. Raises BadInput for images without classes, and for a class that only val has.
    """
    check_classes(train, val)
    with evaluating(backbone):
        return (extract_features(backbone, train, config, device_of(backbone), transforms),
                extract_features(backbone, val, config, device_of(backbone), transforms))


def pixel_features(train: Source, val: Source, config: Evaluation) -> Splits:
    """The pixels themselves as features: what no backbone at all would give."""
    return backbone_features(nn.Flatten(), train, val, config)


@torch.inference_mode()
def extract_features(features: Callable[[Tensor], Tensor], source: Source, config: Evaluation, device: torch.device,
                     transforms: Transforms = IMAGENET) -> Labelled:
    """Features and classes of every image that can be read. ImageNet's 1.28 million of width 2048 take 10.5 GB."""
    labels, found = labels_of(source), torch.empty(0)
    for numbers, images in centre_crops(source, range(len(source)), config, transforms):
        part = features(normalise(images.to(device, non_blocking=True), transforms.mean, transforms.std))
        if not len(found):
            found = torch.empty(len(source), part.shape[1])
        found[numbers.start:numbers.stop] = part
    if not source.skipped:
        return found, labels
    readable = were_read(source, range(len(source)))
    return found[readable], labels[readable]


def centre_crops(source: Source, numbers: range, config: Evaluation,
                 transforms: Transforms) -> Iterator[tuple[range, Tensor]]:
    """The images of `numbers`, uint8 [B, 3, crop_size, crop_size], in batches; a thread reads one batch ahead."""
    def read(part: range) -> Tensor:
        return source.images(part, config.resize_size, config.crop_size, transforms.interpolation)

    parts = [numbers[start:start + config.batch_size] for start in range(0, len(numbers), config.batch_size)]
    with ThreadPoolExecutor(1, thread_name_prefix="evaluation") as reader:
        ahead = [reader.submit(read, part) for part in parts[:1]]
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            images = ahead.pop().result()
            if following is not None:
                ahead.append(reader.submit(read, following))
            yield part, images


def were_read(source: Source, numbers: range) -> Tensor:
    """Which of `numbers`' images are what they should be, bool [B]: another stands in for one that is unreadable."""
    return torch.tensor([number not in source.skipped for number in numbers], dtype=torch.bool)


def labels_of(source: Source) -> Tensor:
    """Classes int64 [N]. Raises BadInput where there are none."""
    if source.labels is None:
        raise BadInput("images without classes", expected="one folder per class", mend="Sort the images into such.")
    return source.labels


def check_classes(train: Source, val: Source) -> None:
    """Raises BadInput where images lack classes, and where a class of val is none of train's."""
    known, asked = (torch.unique(labels_of(source)).tolist() for source in (train, val))
    if train.classes and val.classes:  # one number could mean two things
        known, asked = [train.classes[label] for label in known], [val.classes[label] for label in asked]
    strangers = [name for name in asked if name not in known]
    if strangers:
        raise BadInput(f"images of class {strangers[0]!r} to evaluate on, and none to train on",
                       expected="no class in the val split that the train split lacks",
                       mend="Move some of them into train, or leave that class out of val.")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """`module` in eval mode; each of its parts comes back to the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def device_of(module: nn.Module) -> torch.device:
    """Where its parameters are; the CPU if it has none."""
    return next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
