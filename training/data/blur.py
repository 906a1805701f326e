"""Gaussian blur with a deviation per image, in place."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

REACH = 3.5  # deviations at which the kernel is cut off: what lies beyond is less than 0.0005 of it


def gaussian_blur_(images: Tensor, sigma: Tensor) -> None:
    """Blurs float32 [B, C, H, W] by `sigma` [B] pixels, on the CPU and above 0; edges are continued.

    Sums of shifted images: the kernels are so small (a reach of 7 pixels at a deviation of 2) that this is four
    times as fast on a CPU as a product with a banded matrix, and no depthwise convolution came near.
    """
    reach = math.ceil(REACH * float(sigma.max()))
    squared = torch.arange(reach + 1).square()
    weights = (-squared / (2 * sigma[:, None].square())).exp()
    weights /= 2 * weights.sum(dim=1, keepdim=True) - weights[:, :1]
    middle, *taps = weights.to(images.device, non_blocking=True)[:, :, None, None, None].unbind(dim=1)
    for dim, edges in ((2, (0, 0, reach, reach)), (3, (reach, reach, 0, 0))):
        padded, size = pad(images, edges, mode="replicate"), images.shape[dim]
        images.mul_(middle)
        for distance, weight in enumerate(taps, start=1):
            images.addcmul_(padded.narrow(dim, reach - distance, size), weight)
            images.addcmul_(padded.narrow(dim, reach + distance, size), weight)
