"""What can be found wrong with a volunteer's data before any image is decoded. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Literal

from PIL import Image

from training.data.cifar10_files import check_cifar10
from training.data.config import Data
from training.data.folder import find_images
from training.data.shard_files import ShardListing, find_shards
from training.errors import BadInput

Loader = Literal["torchvision", "dali"]

SAMPLE = 16  # files whose headers are read for their sizes
WANTED = {"image_folder": "a folder of JPEG or PNG images", "cifar10": "the folder cifar-10-batches-py",
          "shards": "a folder of tar shards"}


@dataclass(frozen=True)
class _Found:
    count: int                       # images to train on
    classes: tuple[str, ...] | None
    sides: list[int]                 # shortest sides in pixels, of a few


def check_data(data: Data, folder: Path | None, batch_size: int, loader: Loader = "torchvision") -> int:
    """How many images there are to train on. Raises BadInput for what can be seen before any image is decoded."""
    check_dataset(data, folder)
    check_loader(data, loader)
    found = _in_memory(data, folder) if data.known_side is not None else _on_disk(data, given(folder))
    check_crop_size(data, found.sides)
    if data.known_side is None:  # otherwise the config has seen to it
        check_classes(data, found.classes)
    check_batch_size(batch_size, found.count)
    return found.count


def _in_memory(data: Data, folder: Path | None) -> _Found:
    if data.dataset == "cifar10":
        check_cifar10(given(folder))
    return _Found(data.images_per_pass, None, [data.known_side or 0])


def _on_disk(data: Data, folder: Path) -> _Found:
    if data.dataset == "shards":
        shards = find_shards(folder, "train")
        return _Found(shards.count, shards.classes, sides(shards.count, partial(_packed, shards)))
    listing = find_images(folder, "train")
    return _Found(len(listing.paths), listing.classes, sides(len(listing.paths), listing.paths.__getitem__))


def _packed(shards: ShardListing, number: int) -> BytesIO:
    with shards.paths[shards.index.tars[number]].open("rb") as tar:
        tar.seek(int(shards.index.offsets[number]))
        return BytesIO(tar.read(int(shards.index.sizes[number])))


def given(folder: Path | None) -> Path:
    """The folder, once `check_dataset` has seen to it that there is one."""
    assert folder is not None
    return folder


def check_dataset(data: Data, folder: Path | None) -> None:
    """Raises BadInput unless a folder is given exactly where the experiment asks for one."""
    if data.dataset != "synthetic" and folder is None:
        raise BadInput("no data folder", expected=f"{WANTED[data.dataset]} to train on",
                       mend="Give it with --data DIR.")
    if data.dataset == "synthetic" and folder is not None:
        raise BadInput(f"data folder {str(folder)!r}", expected="none: this experiment makes its own images",
                       mend="Leave out --data.")



def check_loader(data: Data, loader: Loader) -> None:
    """Raises BadInput for DALI where it is not installed, or where there is nothing to decode."""
    if loader == "torchvision":
        return
    if data.known_side is not None:
        raise BadInput(f"--loader dali for the images of {data.dataset}", expected="--loader torchvision, as these are "
                       "in memory: nothing to decode", mend="Leave out --loader.")
    if not (find_spec("nvidia") and find_spec("nvidia.dali")):
        raise BadInput("--loader dali without DALI", expected="NVIDIA DALI beside covey",
                       mend="Install it with pip install 'covey[dali]', or take --loader torchvision.")


def check_batch_size(batch_size: int, count: int) -> None:
    """Raises BadInput unless `count` images fill a batch: the incomplete one at a pass's end is dropped."""
    if not 1 <= batch_size <= count:
        raise BadInput(f"batch size {batch_size}", expected=f"1 to {count}, the number of images to train on",
                       mend="Change --batch-size, or give more images.")


def check_classes(data: Data, classes: tuple[str, ...] | None) -> None:
    """Raises BadInput where the experiment's classifier has not as many classes as the images."""
    if data.num_classes is None:
        return
    if classes is None:
        raise BadInput("images without classes", expected=f"{data.num_classes} classes, as data.num_classes says",
                       mend="Sort the images into one folder per class.")
    if len(classes) != data.num_classes:
        raise BadInput(f"images of {len(classes)} classes", expected=f"{data.num_classes}, as data.num_classes says",
                       mend="Check the data folder, or the recipe.")


def check_crop_size(data: Data, shortest_sides: list[int]) -> None:
    """Raises BadInput if all images are smaller than the largest crop: it would show magnified pixels."""
    largest, side = max(data.transforms.size_crops), max(shortest_sides, default=None)
    if side is not None and side < largest:
        raise BadInput(f"crops larger than images: of {largest} pixels, and the images of data.dataset = "
                       f"{data.dataset!r} have {side} at most", mend="Lower it, or take larger images.",
                       expected=f"data.transforms.size_crops of at most {side}")


def sides(count: int, give: Callable[[int], Path | BytesIO]) -> list[int]:
    """Shortest sides in pixels, as the headers say, of up to SAMPLE spread over `count` images."""
    found = []
    for number in range(0, count, max(1, count // SAMPLE))[:SAMPLE]:
        try:
            with Image.open(give(number)) as image:
                found.append(min(image.size))
        except (OSError, ValueError, Image.DecompressionBombError):  # named when its turn comes
            continue
    return found
