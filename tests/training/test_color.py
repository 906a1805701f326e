"""Colour and blur, image by image, against torchvision's operations and closed forms."""

import pytest
import torch
from torchvision.transforms.v2 import functional

from training.data import color
from training.data.blur import gaussian_blur_


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colour_operations_agree_with_torchvision_image_by_image(name: str) -> None:
    batch = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    batch[0] = batch[0].mean(dim=0)  # gray: no hue, no saturation
    batch[1] = batch[1].round()  # pure colours, black and white
    amounts = torch.linspace(-0.5, 0.5, 8) if name == "hue" else torch.linspace(0, 1.9, 8)
    changed = batch.clone()
    getattr(color, f"adjust_{name}_")(changed, amounts)
    for image, amount, found in zip(batch, amounts.tolist(), changed, strict=True):
        torch.testing.assert_close(found, getattr(functional, f"adjust_{name}")(image, amount), atol=2e-5, rtol=0)


def test_every_hue_comes_back_after_a_whole_turn_in_parts() -> None:
    batch = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    turned = batch.clone()
    for _ in range(5):
        color.adjust_hue_(turned, torch.tensor([0.2, -0.2]))
    torch.testing.assert_close(turned, batch, atol=1e-5, rtol=0)


def test_grayscale_agrees_with_torchvision() -> None:
    batch = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(color.grayscale(batch), functional.rgb_to_grayscale(batch), atol=1e-6, rtol=0)


def test_blur_is_the_exact_gaussian_to_within_a_thousandth() -> None:
    """An independent one: products with whole Gaussian matrices, in float64, edges continued by 20 pixels."""
    sigma = torch.tensor([0.1, 0.3, 0.7, 1.0, 1.6, 2.0])
    batch = torch.rand(6, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    blurred = batch.clone()
    gaussian_blur_(blurred, sigma)
    padded = torch.nn.functional.pad(batch, [20] * 4, mode="replicate").double()
    for image, deviation, found in zip(padded, sigma.double(), blurred, strict=True):
        rows, columns = (kernel(side, deviation) for side in image.shape[1:])
        exact = (rows @ image @ columns.T)[:, 20:-20, 20:-20]
        torch.testing.assert_close(found.double(), exact, atol=1e-3, rtol=0)


def kernel(side: int, deviation: torch.Tensor) -> torch.Tensor:
    offsets = torch.arange(side).double()
    weights = (-(offsets - offsets[:, None]).square() / (2 * deviation.square())).exp()
    return weights / weights.sum(dim=1, keepdim=True)


def test_blur_agrees_with_torchvision_away_from_the_border() -> None:
    sigmas, batch = (0.3, 1.0, 2.0), torch.rand(3, 3, 48, 48)
    blurred = batch.clone()
    gaussian_blur_(blurred, torch.tensor(sigmas))
    for image, found, sigma in zip(batch, blurred, sigmas, strict=True):
        expected = functional.gaussian_blur(image, [23, 23], [sigma, sigma])
        torch.testing.assert_close(found[:, 12:-12, 12:-12], expected[:, 12:-12, 12:-12], atol=1e-3, rtol=0)


def test_blur_keeps_constant_images_up_to_their_edges() -> None:
    images = torch.ones(1, 3, 8, 8)
    gaussian_blur_(images, torch.tensor([2.0]))
    torch.testing.assert_close(images, torch.ones(1, 3, 8, 8))
