"""An image folder with train and val, whose every image is told from the others by its brightness."""

from pathlib import Path

import torch
from torchvision.io import write_jpeg, write_png

CLASSES = ("ant", "bee")


def write_images(root: Path, train: int = 20, val: int = 6, side: int = 24) -> None:
    """Image n of a split is of brightness 4 n, in class n % 2; every third is a PNG, and all are `side` x 2 `side`."""
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            folder = root / split / CLASSES[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            image = torch.full((3, side, 2 * side), 4 * number, dtype=torch.uint8)
            if number % 3:
                write_jpeg(image, str(folder / f"{number:03}.JPEG"), quality=95)
            else:
                write_png(image, str(folder / f"{number:03}.png"))
