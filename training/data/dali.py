"""Decoding and cropping by NVIDIA DALI on the CPU, in place of torchvision: the same draws, the same crops."""

from collections.abc import Sequence
from io import BytesIO
from threading import Lock
from typing import Any

import numpy
import torch
from nvidia.dali import Pipeline, fn, types
from PIL import ExifTags, Image
from torch import Tensor

from training.data.crops import CropDraw, empty_crops
from training.data.sources import EncodedSource, Skipped
from training.data.transforms_config import Interpolation

FILTERS: dict[Interpolation, Any] = {"bilinear": types.INTERP_LINEAR, "triangular": types.INTERP_LINEAR,
                                     "bicubic": types.INTERP_CUBIC}
TURNED = {5, 6, 7, 8}  # EXIF's orientations that swap height and width


class DaliSource:
    """The images of `source`, with crops made by DALI; what DALI refuses is left to `source`, which names bad files.

    At the border of a crop DALI's filter sees the pixels beside it, torchvision's does not: they differ there by a few
    of 255 levels, elsewhere by rounding. On the CPU, DALI decodes as fast as torchvision and resizes more slowly.
    """

    def __init__(self, source: EncodedSource, *, threads: int) -> None:
        self.labels, self.classes = source.labels, source.classes
        self._source, self._threads = source, threads
        self._lock = Lock()  # crops() is called from several threads, and a pipeline runs one batch at a time
        self._pipeline: tuple[tuple[object, ...], Any] | None = None

    @property
    def skipped(self) -> Skipped:
        """What could not be read so far."""
        return self._source.skipped

    def __len__(self) -> int:
        return len(self._source)

    def images(self, indices: Sequence[int], resize_size: int, crop_size: int,
               interpolation: Interpolation = "bilinear") -> Tensor:
        """What `source` makes of them: what is evaluated does not depend on the loader."""
        return self._source.images(indices, resize_size, crop_size, interpolation)

    def crops(self, indices: Sequence[int], draw: CropDraw) -> list[Tensor]:
        """uint8, one [num_crops * B, 3, size, size] per size of crop, crop-major."""
        try:
            files = [self._source.readable(index, _with_size) for index in indices]
        except Image.DecompressionBombError:  # PIL has a bound where torchvision has none
            return self._source.crops(indices, draw)
        with self._lock:
            try:
                return self._run([file for file, _, _ in files], _corners(files, draw), draw)
            except RuntimeError:
                self._pipeline = None  # an error ends it
        return self._source.crops(indices, draw)

    def _run(self, files: Sequence[bytes], corners: Tensor, draw: CropDraw) -> list[Tensor]:
        pipeline = self._built(len(files), draw)
        pipeline.feed_input("files", [numpy.frombuffer(file, dtype=numpy.uint8) for file in files])
        pipeline.feed_input("corners", corners.numpy())
        made = iter(pipeline.run())
        crops = empty_crops(len(files), draw)
        for group in crops:
            for views in group.view(-1, len(files), *group.shape[1:]):
                views.copy_(torch.from_numpy(next(made).as_array()).permute(0, 3, 1, 2))
        return crops

    def _built(self, batch: int, draw: CropDraw) -> Any:
        shape = (batch, draw.num_crops, draw.size_crops, draw.interpolation)
        if self._pipeline is None or self._pipeline[0] != shape:
            self._pipeline = shape, _build(batch, draw, self._threads)
        return self._pipeline[1]


def _build(batch: int, draw: CropDraw, threads: int) -> Any:
    """A pipeline from encoded files and corners of crops, float32 [V, 4], to V crops, uint8 [size, size, 3] each."""
    pipeline = Pipeline(batch_size=batch, num_threads=threads, device_id=None, prefetch_queue_depth=1,
                        exec_async=False, exec_pipelined=False)
    with pipeline:
        files = fn.external_source(name="files", ndim=1, dtype=types.UINT8)
        corners = fn.external_source(name="corners", ndim=2, dtype=types.FLOAT)
        image = fn.decoders.image(files, device="cpu", output_type=types.RGB, jpeg_fancy_upsampling=True)
        sizes = [size for size, count in zip(draw.size_crops, draw.num_crops, strict=True) for _ in range(count)]
        pipeline.set_outputs(*(
            fn.resize(image, size=[size, size], roi_start=corners[view, 0:2], roi_end=corners[view, 2:4],
                      interp_type=FILTERS[draw.interpolation], antialias=True) for view, size in enumerate(sizes)))
    pipeline.build()
    return pipeline


def _corners(files: Sequence[tuple[bytes, int, int]], draw: CropDraw) -> Tensor:
    """Top, left, bottom and right of every crop in pixels, float32 [B, V, 4]."""
    boxes = torch.cat([draw.of(place).boxes(height, width) for place, (_, height, width) in enumerate(files)], dim=2)
    start, length = boxes[:2], boxes[2:]
    return torch.cat([start, start + length]).permute(2, 1, 0).float().contiguous()


def _with_size(encoded: bytes) -> tuple[bytes, int, int]:
    """The file with the height and width of its image once it is upright. Raises OSError or ValueError for no image."""
    with Image.open(BytesIO(encoded), formats=("JPEG", "PNG")) as image:
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation) in TURNED
    return (encoded, width, height) if turned else (encoded, height, width)
