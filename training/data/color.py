"""Colour operations with a strength per image, in place, on RGB in [0, 1]: float32 [B, 3, H, W].

They agree with torchvision.transforms.v2.functional, which knows but one strength for a whole batch; strengths may
lie on the CPU wherever the images are. Nothing here chooses by mask: one `torch.where` costs as much as a jitter.
"""

import torch
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, with the digits that torchvision keeps


def grayscale(images: Tensor) -> Tensor:
    """Luma, [B, 1, H, W], anew."""
    red, green, blue = torch.split(images, 1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def adjust_brightness_(images: Tensor, factors: Tensor) -> None:
    """Scaled by `factors` [B]; 1 changes nothing."""
    images.mul_(_per_image(factors, images)).clamp_(0, 1)


def adjust_contrast_(images: Tensor, factors: Tensor) -> None:
    """Distance to the image's mean luma scaled by `factors` [B]; 1 changes nothing."""
    factors = _per_image(factors, images)
    red, green, blue = torch.split(images.mean(dim=(2, 3), keepdim=True), 1, dim=1)
    luma = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue  # linear: of the mean, and the mean of it
    images.mul_(factors).add_(luma * (1 - factors)).clamp_(0, 1)


def adjust_saturation_(images: Tensor, factors: Tensor) -> None:
    """Distance to each pixel's luma scaled by `factors` [B]; 1 changes nothing."""
    factors = _per_image(factors, images)
    luma = grayscale(images).mul_(1 - factors)
    images.mul_(factors).add_(luma).clamp_(0, 1)


def adjust_hue_(images: Tensor, turns: Tensor) -> None:
    """Hue in HSV moved by `turns` [B] of a full turn; 0 changes nothing but rounding.

    Hue in sixths of a turn, from -3 to 3, is as far from red as 1 + (G + B - R - min) / chroma, on the side of the
    larger of G and B. Back in RGB, channel c is min + chroma * clamp(||hue - n_c| - 3| - 1, 0, 1), and n = 0, 2, -2.
    """
    red, green, blue = images.unbind(dim=1)
    least = torch.minimum(red, green)
    least = torch.minimum(least, blue, out=least)
    chroma = torch.maximum(red, green)
    chroma = torch.maximum(chroma, blue, out=chroma).sub_(least)
    hue = (green + blue).sub_(red).sub_(least).div_(chroma.clamp(min=1e-12)).add_(1)
    side = green - blue
    hue = torch.copysign(hue, side, out=hue).add_(6 * _per_image(turns, images)[:, 0])
    hue.sub_(torch.mul(hue, 1 / 6, out=side).round_(), alpha=6)
    least.sub_(chroma)  # as below 1 is added to the share of chroma
    for channel, place in zip((red, green, blue), (0, 2, -2), strict=True):
        share = torch.sub(hue, place, out=side).abs_().sub_(3).abs_().clamp_(1, 2)
        torch.addcmul(least, chroma, share, out=channel)


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.to(images.device, non_blocking=True)[:, None, None, None]
