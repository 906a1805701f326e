"""A labelled source small enough to reason about."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Pictures:
    """Images uint8 [N, 3, S, S] that are handed out as they are, and what was asked for."""

    def __init__(self, images: Tensor, labels: Tensor | None, classes: tuple[str, ...] | None = None) -> None:
        self.labels, self.classes, self.skipped = labels, classes, dict[int, str]()
        self.asked: list[tuple[int, int, str]] = []
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def images(self, indices: Sequence[int], resize_size: int, crop_size: int,
               interpolation: str = "bilinear") -> Tensor:
        self.asked.append((resize_size, crop_size, interpolation))
        return self._images[torch.tensor(indices)]


def noise(count: int, classes: int, seed: int = 0) -> Pictures:
    """Images of noise, of as many classes."""
    generator = torch.Generator().manual_seed(seed)
    return Pictures(torch.randint(0, 256, (count, 3, 4, 4), dtype=torch.uint8, generator=generator),
                    torch.arange(count) % classes)


def bright_or_dark(count: int) -> Pictures:
    """Images of two classes that differ in the brightness of a channel of their own."""
    labels = torch.arange(count) % 2
    images = torch.full((count, 3, 8, 8), 20, dtype=torch.uint8)
    images[torch.arange(count), labels] = 200
    return Pictures(images, labels, ("first", "second"))
