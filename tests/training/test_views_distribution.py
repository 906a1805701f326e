"""Crops and views together against the classic pipeline: torchvision's transforms on PIL images, one by one."""

import random
from functools import cache

import pytest
import torch
from PIL import Image, ImageFilter
from scipy.stats import ks_2samp
from torch import Tensor
from torch.nn.functional import conv2d, interpolate
from torchvision import transforms as classic
from torchvision.transforms.functional import to_pil_image

from training.data.batches import Batch
from training.data.color import grayscale
from training.data.crops import draw_crops
from training.data.resampling import cut_many
from training.data.transforms_config import Transforms
from training.data.views import Views

COUNT, SIZE, SCALE = 1500, 48, (0.14, 1.0)


@cache
def photo() -> Tensor:
    """Blotches of every colour with fine grain, uint8 [3, 96, 128]."""
    generator = torch.Generator().manual_seed(0)
    blotches = interpolate(torch.rand(1, 3, 6, 8, generator=generator), size=(96, 128), mode="bicubic")[0]
    grain = 0.1 * torch.randn(3, 96, 128, generator=generator)
    return ((blotches + grain).clamp(0, 1) * 255).to(torch.uint8)


@cache
def ours() -> dict[str, Tensor]:
    t = Transforms(total_num_crops=1, num_crops=(1,), size_crops=(SIZE,), crop_scales=(SCALE,),
                   mean=(0, 0, 0), std=(1, 1, 1))
    crops = cut_many(photo().expand(COUNT, 3, 96, 128), draw_crops(t, COUNT, "me", 0))
    return measured(Views(t, "me")(Batch(0, crops, None, COUNT), "cpu")[0])


@cache
def theirs() -> dict[str, Tensor]:
    pipeline = classic.Compose([
        classic.RandomResizedCrop(SIZE, scale=SCALE), classic.RandomHorizontalFlip(0.5),
        classic.RandomApply([classic.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8), classic.RandomGrayscale(0.2),
        classic.RandomApply([classic.Lambda(blurred)], 0.5), classic.ToTensor()])
    image = to_pil_image(photo())
    random.seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return measured(torch.stack([pipeline(image) for _ in range(COUNT)]))


def blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))


def measured(views: Tensor) -> dict[str, Tensor]:
    """Per view, of RGB in [0, 1]: [COUNT] each."""
    luma, (red, green, blue) = grayscale(views), views.mean(dim=(2, 3)).T
    laplacian = conv2d(luma, torch.tensor([[[[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]]])).var(dim=(1, 2, 3))
    return {"brightness": luma.mean(dim=(1, 2, 3)), "contrast": luma.std(dim=(1, 2, 3)),
            "saturation": (views.amax(dim=1) - views.amin(dim=1)).mean(dim=(1, 2)),
            "red against green": red - green, "blue against green": blue - green,
            "left against right": (luma[..., :SIZE // 2] - luma[..., SIZE // 2:]).mean(dim=(1, 2, 3)),
            "sharpness": (laplacian + 1e-4).log(),  # what uint8 rounds off in the rival is far below 1e-4
            "gray": ((views.amax(dim=1) - views.amin(dim=1)).amax(dim=(1, 2)) < 1e-5).float()}


QUANTITIES = ["brightness", "contrast", "saturation", "red against green", "blue against green",
              "left against right", "sharpness", "gray"]


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_means_agree_within_their_standard_errors(quantity: str) -> None:
    """Three standard errors of the difference of two means of 1500: exceeded by equal ones once in 370 seeds."""
    mine, rival = ours()[quantity], theirs()[quantity]
    error = ((mine.var() + rival.var()) / COUNT).sqrt()
    assert abs(mine.mean() - rival.mean()) < 3 * error
    assert mine.std() == pytest.approx(rival.std().item(), rel=0.08)


@pytest.mark.parametrize("quantity", [name for name in QUANTITIES if name != "gray"])
def test_distributions_cannot_be_told_apart(quantity: str) -> None:
    """Kolmogorov-Smirnov: equal ones are told apart once in a thousand seeds."""
    assert ks_2samp(ours()[quantity].numpy(), theirs()[quantity].numpy()).pvalue > 1e-3
