"""Random crops, brought to size in uint8: where they are drawn, and how they are cut from an image.

The distribution is that of torchvision's RandomResizedCrop; each crop of each image is drawn by itself.
"""

import math
from dataclasses import dataclass, replace

import numpy
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from training.data.draws import seeded, uniform
from training.data.transforms_config import Interpolation, Interval, Transforms

TRIES = 10  # draws of a box before the largest in the middle is taken, as in RandomResizedCrop
MODES: dict[Interpolation, str] = {"bilinear": "bilinear", "triangular": "bilinear", "bicubic": "bicubic"}


@dataclass(frozen=True)
class CropDraw:
    """Where the V crops of each of B images are cut, drawn before the sizes of the images are known."""

    num_crops: tuple[int, ...]    # of each size; V in all
    size_crops: tuple[int, ...]   # side in pixels
    interpolation: Interpolation
    ratio_bounds: Interval
    areas: Tensor                 # float32 [V, TRIES, B]: share of the image's area
    ratios: Tensor                # float32 [V, TRIES, B]: width over height
    places: Tensor                # float32 [2, V, B] in [0, 1): down, across

    def of(self, image: int) -> "CropDraw":
        """The draw of one image of the batch."""
        one = slice(image, image + 1)
        return replace(self, areas=self.areas[..., one], ratios=self.ratios[..., one], places=self.places[..., one])

    def boxes(self, height: int, width: int) -> Tensor:
        """Top, left, height and width in pixels of the crops of images of one size, int64 [4, V, B].

        In numpy, whose operations on so few numbers take a third of the time of torch's.
        """
        area, ratios = self.areas.numpy() * (height * width), self.ratios.numpy()
        rows, columns = numpy.rint(numpy.sqrt(area / ratios)), numpy.rint(numpy.sqrt(area * ratios))
        fits = (rows > 0) & (columns > 0) & (rows <= height) & (columns <= width)
        first, found = fits.argmax(1)[:, None], fits.any(1)
        widest, tallest = self._largest(height, width)
        rows = numpy.where(found, numpy.take_along_axis(rows, first, 1)[:, 0], tallest)
        columns = numpy.where(found, numpy.take_along_axis(columns, first, 1)[:, 0], widest)
        room = numpy.stack([height - rows, width - columns])
        drawn = numpy.minimum(numpy.floor(self.places.numpy() * (room + 1)), room)
        corner = numpy.where(found, drawn, numpy.floor(room / 2))
        return torch.from_numpy(numpy.concatenate([corner, rows[None], columns[None]]).astype(numpy.int64))

    def _largest(self, height: int, width: int) -> tuple[int, int]:
        low, high = self.ratio_bounds
        return min(width, round(height * high)), min(height, round(width / low))


def draw_crops(transforms: Transforms, batch: int, key: str, number: int) -> CropDraw:
    """The crops of batch `number` of `key`: equal arguments, equal draw."""
    t, generator = transforms, seeded(key, number, "crops")
    areas = torch.cat([uniform((count, TRIES, batch), scale, generator)
                       for count, scale in zip(t.num_crops, t.crop_scales, strict=True)])
    low, high = (math.log(bound) for bound in t.crop_ratio)
    ratios = uniform((t.total_num_crops, TRIES, batch), (low, high), generator).exp()
    places = torch.rand((2, t.total_num_crops, batch), generator=generator)
    return CropDraw(t.num_crops, t.size_crops, t.interpolation, t.crop_ratio, areas, ratios, places)


def empty_crops(batch: int, draw: CropDraw) -> list[Tensor]:
    """Room for the crops of a batch: uint8, one [num_crops * batch, 3, size, size] per size.

    Pinned where a GPU is in use, so that the one copy on a batch's way runs beside the training.
    """
    pinned = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return [torch.empty((count * batch, 3, size, size), dtype=torch.uint8, pin_memory=pinned)
            for count, size in zip(draw.num_crops, draw.size_crops, strict=True)]


def cut(image: Tensor, draw: CropDraw, place: int, crops: list[Tensor]) -> None:
    """Writes the crops of `image`, uint8 [3, H, W], where those of image `place` of the batch belong."""
    boxes = iter(draw.of(place).boxes(*image.shape[1:]).squeeze(2).T.tolist())
    for group, count in zip(crops, draw.num_crops, strict=True):
        for row in range(place, len(group), len(group) // count):
            top, left, height, width = next(boxes)
            window = image[None, :, top:top + height, left:left + width]
            group[row] = resize(window, (group.shape[2], group.shape[3]), draw.interpolation)[0]


def resize(images: Tensor, size: tuple[int, int], interpolation: Interpolation = "bilinear") -> Tensor:
    """uint8 [B, 3, H, W] to [B, 3, *size], antialiased."""
    return interpolate(images, size=size, mode=MODES[interpolation], antialias=True)
