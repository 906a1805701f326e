"""Where the images lie in tar files, so that they can be read by number. Imports no torch."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy
from numpy.typing import NDArray

from training.atomic import move_into_place
from training.data.tar_walk import UNLABELLED, member_name, walk
from training.errors import BadInput

CACHE = ".{}.offsets.npz"  # of a split, beside its tars: walking through ImageNet's takes a minute


@dataclass(frozen=True)
class TarIndex:
    """One entry per image: int64 [N] each."""

    tars: NDArray[numpy.int64]     # number of the tar
    offsets: NDArray[numpy.int64]  # of the image file's first byte
    sizes: NDArray[numpy.int64]    # of the image file, in bytes
    labels: NDArray[numpy.int64]   # UNLABELLED throughout where there are none

    def __len__(self) -> int:
        return len(self.tars)

    def class_numbers(self) -> tuple[int, ...] | None:
        """The labels, if there are any."""
        return tuple(self.labels.tolist()) if (self.labels != UNLABELLED).all() else None


def index_tars(paths: Sequence[Path], cache: Path) -> TarIndex:
    """Index of the images in `paths`, kept at `cache` if that can be written. Raises BadInput for a broken tar."""
    stats = [path.stat() for path in paths]
    state = json.dumps([[path.name, stat.st_size, stat.st_mtime_ns] for path, stat in zip(paths, stats, strict=True)])
    cached = _read(cache, state, numpy.array([stat.st_size for stat in stats]))
    if cached is not None:
        return cached
    rows = [(number, *row) for number, path in enumerate(paths) for row in walk(path)]
    if not rows:
        raise BadInput(f"shards in {str(cache.parent)!r} without images", expected="JPEG or PNG files in them",
                       mend="Check the path given with --data.")
    index = TarIndex(*numpy.array(rows, dtype=numpy.int64).T.copy())
    labelled = index.labels != UNLABELLED
    if labelled.any() and not labelled.all():
        first = int(labelled.argmin())
        path = paths[index.tars[first]]
        raise BadInput(f"{path}: {member_name(path, int(index.offsets[first]))} without a label",
                       expected="a label for every image, or for none", mend="Make the shards anew.")
    _write(cache, state, index)
    return index


def _read(path: Path, state: str, tar_bytes: NDArray[numpy.int64]) -> TarIndex | None:
    """The index kept at `path`, if it was made of these very tars and stays within them."""
    try:
        with numpy.load(path, allow_pickle=False) as kept:
            if str(kept["state"]) != state:
                return None
            index = TarIndex(*(kept[name].astype(numpy.int64) for name in ("tars", "offsets", "sizes", "labels")))
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    columns = (index.tars, index.offsets, index.sizes, index.labels)
    if len({column.shape for column in columns}) != 1 or index.tars.ndim != 1 or not len(index):
        return None
    if min(column.min() for column in columns[:3]) < 0 or index.tars.max() >= len(tar_bytes):
        return None
    return index if (index.offsets + index.sizes <= tar_bytes[index.tars]).all() else None


def _write(path: Path, state: str, index: TarIndex) -> None:
    staged = path.with_suffix(f".{os.getpid()}.npz")  # two peers on one machine may share the folder
    try:
        numpy.savez(staged, state=numpy.array(state), tars=index.tars, offsets=index.offsets, sizes=index.sizes,
                    labels=index.labels)
        move_into_place(staged, path)
    except OSError:  # a folder that can only be read: walk again next time
        staged.unlink(missing_ok=True)
