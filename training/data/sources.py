"""Sets of images that can be asked for by number: a folder of files, or the synthetic set."""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional

from training.data import synthetic
from training.data.config import Data
from training.data.folder import Listing, Split, check_dataset, find_images
from training.errors import BadInput

logger = logging.getLogger(__name__)

CACHE_BYTES = 1 << 30  # a folder whose decoded images fit into 1 GiB is decoded once and kept in memory
DECODING_THREADS = min(4, os.cpu_count() or 1)

Skipped = dict[int, str]  # index of an image that could not be read -> its file's name; its length is the count


class Source(Protocol):
    """A set of images of one size."""

    @property
    def labels(self) -> Tensor | None:
        """Class of every image, int64 [N]; None where there are no classes."""

    @property
    def skipped(self) -> Skipped:
        """What could not be read so far."""

    def __len__(self) -> int: ...

    def images(self, indices: Sequence[int]) -> Tensor:
        """The images of these numbers, uint8 [B, 3, S, S] in RGB; the next readable one in place of an unreadable.

        Raises BadInput if no image at all can be read.
        """


def open_source(data: Data, folder: Path | None, split: Split) -> Source:
    """The images of `data` in one split. Raises BadInput where `folder` is not what `data.dataset` asks for."""
    check_dataset(data, folder)
    if folder is not None:
        return FolderSource(find_images(folder, split), data.image_size)
    images, labels = synthetic.generate(data.synthetic, data.image_size, split)
    return MemorySource(images, labels)


class MemorySource:
    """Images that are there already: uint8 [N, 3, S, S], and their classes, int64 [N]."""

    def __init__(self, images: Tensor, labels: Tensor | None) -> None:
        self.labels, self.skipped = labels, Skipped()
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def images(self, indices: Sequence[int]) -> Tensor:
        return self._images[torch.as_tensor(indices, dtype=torch.int64)]


class FolderSource:
    """Image files, decoded when asked for by a few threads that end with the call.

    Threads, because decoding releases the GIL, and because a process forked after the DHT has started would
    inherit its sockets and locks.
    """

    def __init__(self, listing: Listing, image_size: int, cache_bytes: int = CACHE_BYTES) -> None:
        self.labels = None if listing.labels is None else torch.tensor(listing.labels)
        self.skipped = Skipped()
        self._paths, self._size = listing.paths, image_size
        shape = (len(self._paths), 3, image_size, image_size)
        self._cache = torch.empty(shape, dtype=torch.uint8) if _bytes(shape) <= cache_bytes else None
        self._cached: set[int] = set()
        self._lock = Lock()  # two threads may meet one bad file; it is named once

    def __len__(self) -> int:
        return len(self._paths)

    def images(self, indices: Sequence[int]) -> Tensor:
        with ThreadPoolExecutor(DECODING_THREADS, thread_name_prefix="decode") as pool:
            return torch.stack(list(pool.map(self._readable, indices)))

    def _readable(self, wanted: int) -> Tensor:
        for offset in range(len(self)):
            index = (wanted + offset) % len(self)
            image = None if index in self.skipped else self._image(index)
            if image is not None:
                return image
        raise BadInput(f"none of the {len(self)} images in the data folder can be read, {self._paths[0]} for one",
                       expected="JPEG or PNG files", mend="Check the data folder.")

    def _image(self, index: int) -> Tensor | None:
        if self._cache is not None and index in self._cached:
            return self._cache[index]
        try:
            image = read_image(self._paths[index], self._size)
        except (OSError, RuntimeError, ValueError) as error:
            self._skip(index, error)
            return None
        if self._cache is not None:
            self._cache[index] = image
            self._cached.add(index)
        return image

    def _skip(self, index: int, error: Exception) -> None:
        with self._lock:
            if index not in self.skipped:
                self.skipped[index] = str(self._paths[index])
                logger.warning("skipping %s, which cannot be read: %s", self._paths[index],
                               str(error).partition("\n")[0])


def read_image(path: Path, size: int) -> Tensor:
    """The JPEG or PNG at `path` as RGB, shortest side brought to `size`, centre cropped: uint8 [3, size, size].

    Raises OSError, RuntimeError or ValueError if it is no such image.
    """
    encoded = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    image = decode_image(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)
    if image.dtype == torch.uint16:
        image = (image.to(torch.int32) >> 8).to(torch.uint8)
    resized = functional.resize(image, [size], antialias=True)
    cropped: Tensor = functional.center_crop(resized, [size, size])
    return cropped


def _bytes(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
