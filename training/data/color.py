"""Colour operations with a strength per image, on RGB in [0, 1]: float32 [B, 3, H, W] in, the same out.

They agree with torchvision.transforms.v2.functional, which knows but one strength for a whole batch.
"""

import torch
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, with the digits that torchvision keeps


def grayscale(images: Tensor) -> Tensor:
    """Luma, [B, 1, H, W]."""
    red, green, blue = images.unbind(dim=1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).unsqueeze(1)


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Scaled by `factors` [B]; 1 changes nothing."""
    return (images * _per_image(factors)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Distance to the image's mean luma scaled by `factors` [B]; 1 changes nothing."""
    return _blend(grayscale(images).mean(dim=(2, 3), keepdim=True), images, factors)


def adjust_saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Distance to each pixel's luma scaled by `factors` [B]; 1 changes nothing."""
    return _blend(grayscale(images), images, factors)


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Hue in HSV moved by `turns` [B] of a full turn; 0 changes nothing but rounding.

    Value and chroma stay as they are, so only the hue is converted: back to RGB, channel c is
    value - chroma * clamp(min(k, 4 - k), 0, 1) with k = (n_c + 6 hue) mod 6 and n = 5, 3, 1 for R, G, B.
    """
    red, green, blue = images.unbind(dim=1)
    value, least = images.amax(dim=1), images.amin(dim=1)
    chroma = value - least
    safe = chroma.clamp(min=1e-12)
    sextant = torch.where(value == red, (green - blue) / safe,
                          torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4))
    sextant = (sextant + 6 * turns[:, None, None]).unsqueeze(1)
    k = (sextant + torch.tensor([5.0, 3.0, 1.0], device=images.device)[:, None, None]).remainder_(6)
    return value.unsqueeze(1) - chroma.unsqueeze(1) * torch.minimum(k, 4 - k).clamp_(0, 1)


def _blend(towards: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    return torch.lerp(towards.expand_as(images), images, _per_image(factors)).clamp_(0, 1)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]
