"""Views of a batch: what is left to do once its crops are cut, done to many crops at once on the training's device."""

from collections.abc import Callable

import torch
from torch import Tensor

from training.data import color
from training.data.batches import Batch
from training.data.blur import gaussian_blur_
from training.data.draws import seeded
from training.data.looks import Looks, draw_looks
from training.data.transforms_config import IMAGENET_MEAN, IMAGENET_STD, PerChannel, Transforms

JITTERS = (color.adjust_brightness_, color.adjust_contrast_, color.adjust_saturation_, color.adjust_hue_)
CACHE_BYTES = 1 << 19  # of a core: crops worked on together stay in it from the first operation to the last


def normalise(images: Tensor, mean: PerChannel = IMAGENET_MEAN, std: PerChannel = IMAGENET_STD) -> Tensor:
    """uint8 [..., 3, H, W], or float in [0, 1], to float32 with mean and deviation taken out."""
    return _normalise_(images / 255 if images.dtype == torch.uint8 else images.clone(), mean, std)


class Views:
    """Random views (SwAV, arXiv 2006.09882, appendix A): the look of each crop of each image is drawn by itself.

    Flip -> colour jitter -> grayscale -> blur -> normalise. What is drawn depends on `key` and the number of the
    batch alone, and is drawn on the CPU: equal on any device.
    """

    def __init__(self, transforms: Transforms, key: str) -> None:
        self._transforms, self._key = transforms, key

    @torch.no_grad()
    def __call__(self, batch: Batch, device: torch.device | str) -> list[Tensor]:
        """One float32 [num_crops * B, 3, size, size] per size of crop, crop-major, on `device`."""
        t, generator = self._transforms, seeded(self._key, batch.number, "looks")
        return [self._views(crops.to(device, non_blocking=True), draw_looks(t, len(crops), generator))
                for crops in batch.crops]

    def _views(self, crops: Tensor, looks: Looks) -> Tensor:
        views = torch.empty(crops.shape, device=crops.device)
        at_once = len(crops) if crops.is_cuda else max(1, CACHE_BYTES // (4 * crops[0].numel()))
        for start in range(0, len(crops), at_once):
            some = slice(start, start + at_once)
            images = views[some].copy_(crops[some]).mul_(1 / 255)
            _look(images, looks.of(some))
            _normalise_(images, self._transforms.mean, self._transforms.std)
        return views


def _look(images: Tensor, looks: Looks) -> None:
    _change(images, [row for row, flipped in enumerate(looks.flipped) if flipped], _flip_)
    for jitter, rows, amounts in looks.jitters():
        _change(images, rows, JITTERS[jitter], amounts)
    _change(images, [row for row, gray in enumerate(looks.gray) if gray], _gray_)
    blurred = [row for row, sigma in enumerate(looks.sigma) if sigma]
    _change(images, blurred, gaussian_blur_, [looks.sigma[row] for row in blurred])


def _change(images: Tensor, rows: list[int], change: Callable[..., None], *amounts: list[float]) -> None:
    """Does `change`, which works in place, to these rows of `images` alone; `amounts` are per row."""
    values = [torch.tensor(each) for each in amounts]
    if len(rows) == len(images):
        change(images, *values)
    elif rows:
        index = torch.tensor(rows).to(images.device, non_blocking=True)
        some = images.index_select(0, index)
        change(some, *values)
        images.index_copy_(0, index, some)


def _flip_(images: Tensor) -> None:
    images.copy_(images.flip(3))


def _gray_(images: Tensor) -> None:
    images.copy_(color.grayscale(images))


def _normalise_(images: Tensor, mean: PerChannel, std: PerChannel) -> Tensor:
    for channel, (centre, deviation) in enumerate(zip(mean, std, strict=True)):
        images[..., channel, :, :].sub_(centre).div_(deviation)
    return images
