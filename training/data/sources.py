"""Sets of images that can be asked for by number: encoded ones in files or shards, or pixels in memory."""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from training.data.crops import CropDraw, cut, empty_crops
from training.data.encoded import decode, middle
from training.data.resampling import cut_many
from training.data.transforms_config import Interpolation
from training.errors import BadInput

logger = logging.getLogger(__name__)

DECODING_THREADS = min(8, os.cpu_count() or 1)  # each holds a batch: 30 MB of 64 images in 8 crops

MOST_LOST = 100  # images in a row that may be gone; more are an outage

Skipped = dict[int, str]  # index of an image that could not be read -> its name; its length is the count
Made = TypeVar("Made")


def readers(wanted: int | None) -> int:
    """Threads that decode and crop: as many as `wanted`, or else as suits this machine."""
    return wanted or DECODING_THREADS


class Source(Protocol):
    """A set of images in RGB. In place of an image that cannot be read stands the next one that can."""

    @property
    def labels(self) -> Tensor | None:
        """Class of every image, int64 [N]; None where there are no classes."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes; None where there are none."""

    @property
    def skipped(self) -> Skipped:
        """What could not be read so far."""

    def __len__(self) -> int: ...

    def crops(self, indices: Sequence[int], draw: CropDraw) -> list[Tensor]:
        """Random crops of these images: uint8, one [num_crops * B, 3, size, size] per size, crop-major.

        May be called by several threads at once. Raises BadInput if no image at all can be read.
        """

    def images(self, indices: Sequence[int], resize_size: int, crop_size: int,
               interpolation: Interpolation = "bilinear") -> Tensor:
        """For evaluation: shortest side brought to `resize_size`, central crop: uint8 [B, 3, crop_size, crop_size]."""


class MemorySource:
    """Images that are there already: uint8 [N, 3, H, W], and their classes, int64 [N]."""

    def __init__(self, images: Tensor, labels: Tensor | None, classes: tuple[str, ...] | None = None) -> None:
        self.labels, self.classes, self.skipped = labels, classes, Skipped()
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def crops(self, indices: Sequence[int], draw: CropDraw) -> list[Tensor]:
        return cut_many(self._chosen(indices), draw)

    def images(self, indices: Sequence[int], resize_size: int, crop_size: int,
               interpolation: Interpolation = "bilinear") -> Tensor:
        return middle(self._chosen(indices), resize_size, crop_size, interpolation)

    def _chosen(self, indices: Sequence[int]) -> Tensor:
        return self._images[torch.as_tensor(indices, dtype=torch.int64)]


class EncodedSource:
    """JPEG and PNG images that `read` gives by number, decoded when asked for; `where` and `name` tell users of them.

    Several threads may ask at once: decoding and resizing release the GIL. No processes, as one forked after the
    DHT has started would inherit its sockets and locks.
    """

    def __init__(self, count: int, read: Callable[[int], bytes], name: Callable[[int], str], labels: Tensor | None,
                 classes: tuple[str, ...] | None, *, where: str, threads: int = DECODING_THREADS) -> None:
        self.labels, self.classes, self.skipped = labels, classes, Skipped()
        self.read, self.name = read, name
        self._count, self._where, self._threads = count, where, threads
        self._lock = Lock()  # two threads may meet one bad image; it is named once

    def __len__(self) -> int:
        return self._count

    def crops(self, indices: Sequence[int], draw: CropDraw) -> list[Tensor]:
        crops = empty_crops(len(indices), draw)
        for place, index in enumerate(indices):
            cut(self.readable(index, decode), draw, place, crops)
        return crops

    def images(self, indices: Sequence[int], resize_size: int, crop_size: int,
               interpolation: Interpolation = "bilinear") -> Tensor:
        def one(index: int) -> Tensor:
            return middle(self.readable(index, decode)[None], resize_size, crop_size, interpolation)

        with ThreadPoolExecutor(self._threads, thread_name_prefix="decode") as pool:
            return torch.cat(list(pool.map(one, indices)))

    def readable(self, wanted: int, use: Callable[[bytes], Made]) -> Made:
        """What `use` makes of image `wanted`, or of the next one of which it can make anything.

        `use` raises OSError, RuntimeError or ValueError for an image that is corrupt. Raises BadInput if all are, and
        OSError where so many in a row can't be read that it must be the disk: to be tried again, by whoever started us.
        """
        lost = 0
        for offset in range(self._count):
            index = (wanted + offset) % self._count
            if index in self.skipped:
                continue
            try:
                return use(self.read(index))
            except OSError as error:
                lost += 1
                if lost > MOST_LOST:
                    raise OSError(error.errno, f"{lost} images of {self._where} in a row: {error}") from None
                self._skip(index, error)
            except (RuntimeError, ValueError) as error:
                self._skip(index, error)
        raise BadInput(f"none of the {self._count} images in {self._where} can be read, {self.name(0)} for one",
                       expected="JPEG or PNG images", mend="Check the data folder.")

    def _skip(self, index: int, error: Exception) -> None:
        with self._lock:
            if index not in self.skipped:
                self.skipped[index] = self.name(index)
                logger.warning("skipping %s, which cannot be read: %s", self.name(index),
                               str(error).partition("\n")[0])


def stand_ins(source: Source, indices: Sequence[int]) -> list[int]:
    """The numbers of the images that are shown for these: their own, or that of the next readable one."""
    return [_stand_in(source, index) for index in indices] if source.skipped else list(indices)


def _stand_in(source: Source, wanted: int) -> int:
    following = ((wanted + offset) % len(source) for offset in range(len(source)))
    return next(index for index in following if index not in source.skipped)
