"""The images of a recipe, opened."""

from pathlib import Path

import torch

from training.data import synthetic
from training.data.checks import Loader, check_classes, check_dataset, check_loader, given
from training.data.cifar10 import open_cifar10
from training.data.config import Data
from training.data.folder import Split, find_images
from training.data.shards import open_shards
from training.data.sources import DECODING_THREADS, EncodedSource, MemorySource, Source


def open_source(data: Data, folder: Path | None, split: Split, *, threads: int = DECODING_THREADS,
                loader: Loader = "torchvision") -> Source:
    """The images of `data` in one split, `threads` of which are decoded at once for evaluation, by `loader`.

    Raises BadInput where `folder` is not what `data` asks for.
    """
    check_dataset(data, folder)
    check_loader(data, loader)
    source = _memory_source(data, folder, split) or _encoded_source(data, folder, split, threads, loader)
    check_classes(data, source.classes)
    return source


def _memory_source(data: Data, folder: Path | None, split: Split) -> MemorySource | None:
    if data.dataset == "synthetic":
        images, labels = synthetic.generate(data.synthetic, data.image_size, split)
        return MemorySource(images, labels, synthetic.class_names(data.synthetic))
    if data.dataset == "cifar10":
        return open_cifar10(given(folder), split)
    return None


def _encoded_source(data: Data, folder: Path | None, split: Split, threads: int, loader: Loader) -> Source:
    if data.dataset == "shards":
        source = open_shards(given(folder), split, threads=threads)
    else:
        source = open_folder(given(folder), split, threads=threads)
    if loader == "dali":
        from training.data.dali import DaliSource  # noqa: PLC0415  (an optional dependency)
        return DaliSource(source, threads=threads)
    return source


def open_folder(folder: Path, split: Split, *, threads: int = DECODING_THREADS) -> EncodedSource:
    """The JPEG and PNG files of one split of `folder`."""
    listing = find_images(folder, split)
    labels = None if listing.labels is None else torch.tensor(listing.labels)
    return EncodedSource(len(listing.paths), lambda index: listing.paths[index].read_bytes(),
                         lambda index: str(listing.paths[index]), labels, listing.classes,
                         where=f"data folder {str(folder)!r}", threads=threads)
