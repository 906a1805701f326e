"""Tar shards as a source of images: random access by number, so that order and resuming are those of a folder."""

import os
import weakref
from pathlib import Path
from threading import Lock

import torch

from training.data.folder import Split
from training.data.shard_files import ShardListing, find_shards
from training.data.sources import EncodedSource
from training.data.tar_walk import member_name

KEPT_OPEN = 128  # files: well below the 1024 that a process may have open on most systems


def open_shards(folder: Path, split: Split, *, threads: int) -> EncodedSource:
    """The images of one split. Raises BadInput as `find_shards` does."""
    listing = find_shards(folder, split)
    reader = ShardReader(listing)
    labels = None if listing.labels is None else torch.tensor(listing.labels)
    return EncodedSource(listing.count, reader.read, reader.name, labels, listing.classes,
                         where=f"shards in {str(folder)!r}", threads=threads)


class ShardReader:
    """Reads image files out of tars, from any thread: with pread no thread moves another's place in a file.

    The first tars that are used stay open; once there are KEPT_OPEN, further ones are opened for each read.
    """

    def __init__(self, listing: ShardListing) -> None:
        self._paths, self._index = listing.paths, listing.index
        self._open: dict[int, int] = {}  # number of the tar -> descriptor
        self._lock = Lock()
        weakref.finalize(self, _close, self._open)

    def read(self, index: int) -> bytes:
        """The image file with this number, as it was packed. Raises OSError if it cannot be read whole."""
        where = self._index
        tar, offset, size = int(where.tars[index]), int(where.offsets[index]), int(where.sizes[index])
        descriptor = self._kept(tar)
        if descriptor is not None:
            return _pread(descriptor, size, offset)
        descriptor = os.open(self._paths[tar], os.O_RDONLY)
        try:
            return _pread(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def name(self, index: int) -> str:
        """Where the image lies, for people."""
        path = self._paths[self._index.tars[index]]
        try:
            return f"{path}: {member_name(path, int(self._index.offsets[index]))}"
        except OSError:  # the tar is gone
            return f"{path}: image {index}"

    def _kept(self, tar: int) -> int | None:
        with self._lock:
            if tar not in self._open and len(self._open) < KEPT_OPEN:
                self._open[tar] = os.open(self._paths[tar], os.O_RDONLY)
            return self._open.get(tar)


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    encoded = os.pread(descriptor, size, offset)
    if len(encoded) != size:
        raise OSError(f"{len(encoded)} of {size} bytes there")
    return encoded


def _close(descriptors: dict[int, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)
