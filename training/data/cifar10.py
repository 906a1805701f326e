"""CIFAR-10 as a source of images in memory."""

from pathlib import Path

import torch

from training.data.cifar10_files import read_cifar10
from training.data.folder import Split
from training.data.sources import MemorySource


def open_cifar10(folder: Path, split: Split) -> MemorySource:
    """The published training set, or as `val` its test set. Raises BadInput where `folder` holds something else."""
    images, labels, classes = read_cifar10(folder, split)
    return MemorySource(torch.from_numpy(images), torch.from_numpy(labels), classes)
