"""Multi-crop views, made of whole batches on the images' own device.

Resizing and blurring are linear and separable, so each is two batched matrix products with a matrix per image:
every image has its own crop and blur, and the cost stays far below the trunk's.
"""

import math

import torch
from torch import Tensor

from training.data.color import adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation, grayscale
from training.data.config import Interval, Transforms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels, as torchvision's models expect
TRIES = 10  # draws of a crop before the last is made to fit, as in torchvision's RandomResizedCrop


def normalise(images: Tensor) -> Tensor:
    """uint8 [..., 3, H, W], or float in [0, 1], to float32 with ImageNet's mean and deviation taken out."""
    scaled = images / 255 if images.dtype == torch.uint8 else images
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD))
    return (scaled - mean) / std


class Views:
    """Random views of a batch (SwAV, arXiv 2006.09882, appendix A): each crop of each image is drawn by itself.

    Crop -> flip -> colour jitter -> grayscale -> blur -> normalise. The order of the four jitters is drawn anew per
    crop of a batch, not per image. Equal seeds give equal views on any device: all draws are made on the CPU.
    """

    def __init__(self, transforms: Transforms, seed: int) -> None:
        self._transforms = transforms
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Tensor]:
        """uint8 [B, 3, S, S] to one float32 [num_crops * B, 3, size, size] per size of crop, crop-major."""
        t = self._transforms
        pixels = images / 255
        return [torch.cat([self._view(pixels, size, scale) for _ in range(count)])
                for count, size, scale in zip(t.num_crops, t.size_crops, t.crop_scales, strict=True)]

    def _view(self, images: Tensor, size: int, scale: Interval) -> Tensor:
        views = self._jitter(self._resized_crop(images, size, scale))
        t, batch = self._transforms, len(images)
        if t.grayscale_probability:
            gray = self._chance(batch, t.grayscale_probability).to(images.device)
            views = torch.where(gray[:, None, None, None], grayscale(views), views)
        if t.blur_probability:
            sigma = self._uniform(batch, t.blur_radius).masked_fill(~self._chance(batch, t.blur_probability), 0)
            views = gaussian_blur(views, sigma.to(images.device))
        return normalise(views)

    def _resized_crop(self, images: Tensor, size: int, scale: Interval) -> Tensor:
        t, (batch, _, height, width) = self._transforms, images.shape
        top, left, rows, columns = self._boxes(batch, height, width, scale).to(images.device)
        flipped = self._chance(batch, t.flip_probability).to(images.device)
        horizontal = resampling(left, columns, size, width)
        horizontal = torch.where(flipped[:, None, None], horizontal.flip(1), horizontal)
        return separable(images, resampling(top, rows, size, height), horizontal)

    def _boxes(self, batch: int, height: int, width: int, scale: Interval) -> Tensor:
        """Top, left, height and width of crops in pixels, unrounded, [4, B]; torchvision's distribution."""
        low, high = self._transforms.crop_ratio
        area = self._uniform((TRIES, batch), scale) * height * width
        ratio = self._uniform((TRIES, batch), (math.log(low), math.log(high))).exp()
        columns, rows = (area * ratio).sqrt(), (area / ratio).sqrt()
        fits = (columns <= width) & (rows <= height)
        first = torch.where(fits.any(0), fits.int().argmax(0), TRIES - 1)[None]
        columns = columns.gather(0, first)[0].clamp(1, width)
        rows = rows.gather(0, first)[0].clamp(1, height)
        top, left = self._uniform((2, batch), (0, 1))
        return torch.stack([top * (height - rows), left * (width - columns), rows, columns])

    def _jitter(self, images: Tensor) -> Tensor:
        t, batch = self._transforms, len(images)
        strength = t.color_jitter_strength
        if not t.color_jitter_probability or not strength:
            return images
        jittered = self._chance(batch, t.color_jitter_probability)
        around_one = (max(0.0, 1 - 0.8 * strength), 1 + 0.8 * strength)
        factors = self._uniform((3, batch), around_one).masked_fill(~jittered, 1).to(images.device)
        turns = self._uniform(batch, (-0.2 * strength, 0.2 * strength)).masked_fill(~jittered, 0).to(images.device)
        steps = [(adjust_brightness, factors[0]), (adjust_contrast, factors[1]), (adjust_saturation, factors[2]),
                 (adjust_hue, turns)]
        for number in torch.randperm(len(steps), generator=self._generator).tolist():
            adjust, amount = steps[number]
            images = adjust(images, amount)
        return images

    def _uniform(self, shape: int | tuple[int, ...], bounds: Interval) -> Tensor:
        return torch.rand(shape, generator=self._generator) * (bounds[1] - bounds[0]) + bounds[0]

    def _chance(self, batch: int, probability: float) -> Tensor:
        return torch.rand(batch, generator=self._generator) < probability


def resampling(start: Tensor, length: Tensor, size: int, extent: int) -> Tensor:
    """Matrices [B, size, extent] that resize the stretch [start, start + length) of `extent` pixels to `size` pixels.

    Bilinear with antialiasing: a triangle as wide as the coarser of the two grids, on the pixels inside the stretch;
    what torchvision's resized_crop computes where the stretch begins and ends between pixels.
    """
    step = (length / size)[:, None, None]
    centres = start[:, None, None] + step * (torch.arange(size, device=start.device) + 0.5)[:, None]
    pixels = torch.arange(extent, device=start.device) + 0.5
    weights = (1 - (pixels - centres).abs() / step.clamp(min=1)).clamp_(min=0)
    inside = (pixels > start[:, None, None]) & (pixels < (start + length)[:, None, None])
    weights *= inside
    return weights / weights.sum(dim=2, keepdim=True)


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Each image blurred with its own deviation `sigma` [B], in pixels; 0 leaves it alone.

    At the border the kernel is cut off and its remainder sums to 1.
    """
    return separable(images, _gaussian(sigma, images.shape[2]), _gaussian(sigma, images.shape[3]))


def _gaussian(sigma: Tensor, extent: int) -> Tensor:
    positions = torch.arange(extent, device=sigma.device)
    squared = (positions - positions[:, None]).square()
    # a deviation this small makes the identity matrix exactly
    kernel = (-squared / (2 * sigma.clamp(min=1e-3).square())[:, None, None]).exp()
    return kernel / kernel.sum(dim=2, keepdim=True)


def separable(images: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """[B, C, H, W] with its columns multiplied by `vertical` [B, h, H] and its rows by `horizontal` [B, w, W]."""
    batch, channels, height, width = images.shape
    rows = torch.bmm(vertical, images.transpose(1, 2).reshape(batch, height, channels * width))
    both = torch.bmm(rows.view(batch, -1, width), horizontal.transpose(1, 2))
    return both.view(batch, -1, channels, horizontal.shape[1]).transpose(1, 2).contiguous()
