"""Crops of many small images at once: resizing is linear and separable, so it is two batched matrix products."""

import torch
from torch import Tensor

from training.data.crops import CropDraw, empty_crops
from training.data.transforms_config import Interpolation

CUBIC = -0.5  # a of Keys' cubic convolution, as PIL and torch's antialiased bicubic have it


def cut_many(images: Tensor, draw: CropDraw) -> list[Tensor]:
    """The crops of uint8 [B, 3, H, W], as `training.data.crops.cut` makes them one by one."""
    batch, _, height, width = images.shape
    boxes = draw.boxes(height, width).transpose(0, 1)
    pixels, crops = images.float(), empty_crops(batch, draw)
    for group, boxes_of_size in zip(crops, torch.split(boxes, list(draw.num_crops)), strict=True):
        size = group.shape[3]
        for part, (top, left, rows, columns) in zip(torch.split(group, batch), boxes_of_size, strict=True):
            vertical = resampling(top, rows, size, height, draw.interpolation)
            horizontal = resampling(left, columns, size, width, draw.interpolation)
            part.copy_(separable(pixels, vertical, horizontal).round_().clamp_(0, 255))
    return crops


def resampling(start: Tensor, length: Tensor, size: int, extent: int, interpolation: Interpolation) -> Tensor:
    """Matrices [B, size, extent] that resize the stretch [start, start + length) of `extent` pixels to `size` pixels.

    The filter is as wide as the coarser of the two grids (antialiasing), on the pixels inside the stretch.
    """
    start, length = start[:, None, None], length[:, None, None]
    step = length / size
    centres = start + step * (torch.arange(size) + 0.5)[:, None]
    pixels = torch.arange(extent) + 0.5
    distance = (pixels - centres).abs() / step.clamp(min=1)
    weights = _cubic(distance) if interpolation == "bicubic" else (1 - distance).clamp_(min=0)
    weights *= (pixels > start) & (pixels < start + length)
    return weights / weights.sum(dim=2, keepdim=True)


def _cubic(x: Tensor) -> Tensor:
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = ((CUBIC * x - 5 * CUBIC) * x + 8 * CUBIC) * x - 4 * CUBIC
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def separable(images: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """[B, C, H, W] with its columns multiplied by `vertical` [B, h, H] and its rows by `horizontal` [B, w, W]."""
    batch, channels, height, width = images.shape
    rows = torch.bmm(vertical, images.transpose(1, 2).reshape(batch, height, channels * width))
    both = torch.bmm(rows.view(batch, -1, width), horizontal.transpose(1, 2))
    return both.view(batch, -1, channels, horizontal.shape[1]).transpose(1, 2)
