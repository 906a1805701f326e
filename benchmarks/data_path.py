"""Multi-crop views per second on one core, against the classic PIL pipeline and lightly's.

`python -m benchmarks.data_path`, or a part of `make bench`. JPEGs of 500 x 375 from a folder, 2x224+6x96, batches of
float32 at the end. covey's workers stop at uint8 crops, and the GPU does the rest; where there is none, the training
process does it, which is counted too.
"""

import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from random import uniform
from statistics import median
from time import perf_counter
from typing import Any

import torch
from lightly.transforms.swav_transform import SwaVTransform
from PIL import Image, ImageFilter
from rich.console import Console
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision import transforms as classic
from torchvision.transforms.functional import to_pil_image

from training.data.batches import Batch, batches
from training.data.crops import draw_crops
from training.data.open import open_folder
from training.data.sources import Source
from training.data.transforms_config import IMAGENET_MEAN, IMAGENET_STD, Transforms
from training.data.views import Views

IMAGES = 32  # of a batch, which is what every turn makes
TURNS = 7
TRANSFORMS = Transforms()

Pipeline = Callable[[int], object]  # makes one batch, of this number


def write_photos(folder: Path) -> None:
    """Photograph-like: smooth, with a little grain; quality 90, about 60 KB each."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        (folder / split).mkdir()  # without the second, a fifth of the first would be held out
    for number in range(IMAGES):
        smooth = interpolate(torch.rand(1, 3, 12, 16, generator=generator), size=(375, 500), mode="bicubic")[0]
        grain = 0.03 * torch.randn(3, 375, 500, generator=generator)
        to_pil_image((smooth + grain).clamp(0, 1)).save(folder / "train" / f"{number:02}.jpg", quality=90)


def loader_share(source: Source) -> list[float]:
    """What part of the time until the second batch of `batches()` is not spent in making the two, per turn."""
    shares = []
    for turn in range(TURNS):
        started = perf_counter()
        for number in range(2):
            source.crops(range(IMAGES), draw_crops(TRANSFORMS, IMAGES, "bench", number))
        making, started = perf_counter() - started, perf_counter()
        stream = batches(source, TRANSFORMS, IMAGES, key=f"bench/{turn}", threads=1)
        for _ in range(2):
            next(stream)
        shares.append(1 - making / (perf_counter() - started))
        stream.close()
    return shares


def classic_view(size: int, scale: tuple[float, float]) -> Callable[[Image.Image], Tensor]:
    """One crop as SwAV's own code makes it: torchvision's transforms on PIL images."""
    blur = classic.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(uniform(0.1, 2.0))))
    transform: Callable[[Image.Image], Tensor] = classic.Compose([
        classic.RandomResizedCrop(size, scale=scale), classic.RandomHorizontalFlip(),
        classic.RandomApply([classic.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8), classic.RandomGrayscale(0.2),
        classic.RandomApply([blur], 0.5), classic.ToTensor(), classic.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    return transform


def pil_pipeline(paths: list[Path]) -> Pipeline:
    """The classic one."""
    t = TRANSFORMS
    views = [classic_view(size, scale) for count, size, scale
             in zip(t.num_crops, t.size_crops, t.crop_scales, strict=True) for _ in range(count)]
    return one_by_one(paths, lambda image: [view(image) for view in views])


def one_by_one(paths: list[Path], views: Callable[[Image.Image], list[Tensor]]) -> Pipeline:
    """Image by image, stacked crop by crop."""
    def make(_: int) -> list[Tensor]:
        made = [views(Image.open(path).convert("RGB")) for path in paths]
        return [torch.stack(crop) for crop in zip(*made, strict=True)]
    return make


def pipelines(folder: Path) -> dict[str, Pipeline]:
    """All that are compared, by name."""
    paths = sorted((folder / "train").iterdir())
    source, views = open_folder(folder, "train", threads=1), Views(TRANSFORMS, "bench")
    swav: Any = SwaVTransform()
    indices = range(len(paths))

    def crops(number: int) -> list[Tensor]:
        return source.crops(indices, draw_crops(TRANSFORMS, IMAGES, "bench", number))

    def whole(number: int) -> list[Tensor]:
        return views(Batch(number, crops(number), None, IMAGES), "cpu")

    return {"PIL": pil_pipeline(paths), "lightly": one_by_one(paths, swav), "workers": crops,
            "total": whole}


def compare(console: Console) -> None:
    """Measures in turns and prints medians, spreads and ratios."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="covey-bench-") as name:
            folder = Path(name)
            write_photos(folder)
            show(measure(pipelines(folder)), console)
            shares = loader_share(open_folder(folder, "train"))
            console.print(f"  the loader's own share of a worker's time: {median(shares):.1%} "
                          f"({min(shares):.1%} to {max(shares):.1%})")
    finally:
        torch.set_num_threads(threads)


def measure(rivals: dict[str, Pipeline]) -> dict[str, list[float]]:
    """Images per second of every rival in every turn, after one to warm up."""
    rates: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(TURNS + 1):
        for name, make in rivals.items():
            started = perf_counter()
            make(turn)
            rates[name].append(IMAGES / (perf_counter() - started))
    return {name: found[1:] for name, found in rates.items()}


def show(rates: dict[str, list[float]], console: Console) -> None:
    """A line per rival, then the ratios that are goals."""
    console.print(f"covey data path, {date.today()}: images/s on one core, JPEGs of 500 x 375, "
                  f"{TRANSFORMS.total_num_crops} crops each, "
                  f"{TURNS} turns of {IMAGES} images", soft_wrap=True)
    meaning = {"PIL": "torchvision's transforms on PIL images", "lightly": "lightly's SwaVTransform",
               "workers": "covey's workers: decode, crop, resize", "total": "covey's workers and views, all on the CPU"}
    for name, found in rates.items():
        console.print(f"  {meaning[name]:<50} {median(found):6.0f} ({min(found):.0f} to {max(found):.0f})")
    for name, goal in (("workers", 5), ("total", 1.5)):
        for rival in ("PIL", "lightly"):
            ratios = [ours / theirs for ours, theirs in zip(rates[name], rates[rival], strict=True)]
            console.print(f"[bold]  {meaning[name]} / {rival}: {median(ratios):.2f}[/] "
                          f"({min(ratios):.2f} to {max(ratios):.2f}); goal: {goal}", soft_wrap=True)


if __name__ == "__main__":
    compare(Console(highlight=False))
