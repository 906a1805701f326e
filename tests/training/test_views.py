"""Views against torchvision's operations, closed forms, and the distributions that they are drawn from."""

import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from training.config import validate
from training.data import color
from training.data.config import PRESETS, Data, Transforms
from training.data.views import MEAN, STD, Views, gaussian_blur, normalise, resampling, separable
from training.errors import BadInput

NOTHING = {"total_num_crops": 1, "num_crops": [1], "size_crops": [32], "crop_scales": [[1, 1]], "crop_ratio": [1, 1],
           "flip_probability": 0, "color_jitter_probability": 0, "grayscale_probability": 0, "blur_probability": 0}


def transforms(**options: object) -> Transforms:
    return validate(Transforms, {**NOTHING, **options})


def images(count: int, size: int = 32) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def seen(batch: Tensor, seed: int = 0, **options: object) -> Tensor:
    """The first views of `batch`, brought back to RGB in [0, 1]."""
    views = Views(transforms(**options), seed)(batch)[0]
    return views * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]


def test_crops_of_one_size_share_a_tensor_crop_by_crop() -> None:
    made = Views(transforms(total_num_crops=5, num_crops=[2, 3], size_crops=[24, 16],
                            crop_scales=[[0.3, 1], [0.1, 0.3]]), seed=0)(images(4))
    assert [view.shape for view in made] == [(8, 3, 24, 24), (12, 3, 16, 16)]
    assert {view.dtype for view in made} == {torch.float32}
    untouched = Views(transforms(total_num_crops=3, num_crops=[3]), seed=0)(images(4))[0]
    torch.testing.assert_close(untouched, normalise(images(4)).repeat(3, 1, 1, 1))


def test_without_any_strength_views_are_the_images() -> None:
    torch.testing.assert_close(seen(images(8)), images(8) / 255, atol=1e-6, rtol=0)


def test_equal_seeds_give_equal_views() -> None:
    first, second, other = (Views(Transforms(size_crops=(32, 16)), seed)(images(4)) for seed in (1, 1, 2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


def test_views_of_one_image_differ() -> None:
    views = Views(Transforms(size_crops=(32, 16)), seed=0)(images(1).repeat(4, 1, 1, 1))[0]
    assert len({tuple(view.flatten().tolist()) for view in views}) == 8


def test_a_view_does_not_depend_on_the_other_images_of_its_batch() -> None:
    batch = images(4)
    alone = batch.clone()
    alone[1:] = 0
    options = Transforms(size_crops=(32, 16))
    torch.testing.assert_close(Views(options, 0)(batch)[0][0], Views(options, 0)(alone)[0][0])


@pytest.mark.parametrize("size", [8, 20, 48])
def test_resampling_agrees_with_resized_crop(size: int) -> None:
    batch = torch.rand(2, 3, 32, 40)
    tops, lefts, heights, widths = (3.0, 0.0), (5.0, 13.0), (20.0, 32.0), (16.0, 27.0)
    resized = separable(batch, resampling(torch.tensor(tops), torch.tensor(heights), size, 32),
                        resampling(torch.tensor(lefts), torch.tensor(widths), size, 40))
    for index, (top, left, height, width) in enumerate(zip(tops, lefts, heights, widths, strict=True)):
        expected = functional.resized_crop(batch[index], int(top), int(left), int(height), int(width), [size, size],
                                           antialias=True)
        torch.testing.assert_close(resized[index], expected, atol=1e-5, rtol=0)


def corners(count: int, **options: object) -> Tensor:
    """Left, right, top and bottom [4, count] of the crops drawn, read from images that show each pixel's place."""
    place = torch.linspace(0, 255, 256).round()
    x, y = place.expand(256, 256), place[:, None].expand(256, 256)
    charts = torch.stack([x, y, torch.zeros(256, 256)]).to(torch.uint8).expand(count, 3, 256, 256)
    views = seen(charts, size_crops=[64], **options) * 255 / 256
    columns, rows = views[:, 0].mean(dim=1), views[:, 1].mean(dim=2)
    # the outermost of 64 pixels lie half of a sixty-third of their distance within the crop's edge
    edges = [(line[:, 0], line[:, -1], (line[:, -1] - line[:, 0]) / 126) for line in (columns, rows)]
    return torch.stack([edge for low, high, half in edges for edge in (low - half, high + half)])


def test_crop_areas_and_ratios_are_spread_as_asked_for() -> None:
    left, right, top, bottom = corners(1000, crop_scales=[[0.1, 0.4]], crop_ratio=[0.75, 4 / 3])
    area, ratio = (right - left) * (bottom - top), (right - left) / (bottom - top)
    assert area.min() > 0.09
    assert area.max() < 0.41
    assert area.mean() == pytest.approx(0.25, abs=0.01)
    assert area.std() == pytest.approx(0.3 / math.sqrt(12), rel=0.08)
    assert ratio.log().abs().max() < math.log(4 / 3) + 0.05
    assert ratio.log().mean() == pytest.approx(0, abs=0.02)
    assert ratio.log().std() == pytest.approx(2 * math.log(4 / 3) / math.sqrt(12), rel=0.08)


def test_crops_lie_anywhere_within_the_image() -> None:
    left, right, top, bottom = corners(1000, crop_scales=[[0.25, 0.25]])
    for low, high in ((left, right), (top, bottom)):
        assert low.min() > -0.01
        assert high.max() < 1.01
        assert (low + high).mean() / 2 == pytest.approx(0.5, abs=0.02)
        assert low.std() == pytest.approx(0.5 / math.sqrt(12), rel=0.08)


def test_whole_images_are_asked_for_whatever_the_ratio() -> None:
    left, right, top, bottom = corners(200, crop_scales=[[1, 1]], crop_ratio=[0.75, 4 / 3])
    assert torch.stack([left, right, top, bottom]).min() > -0.01
    assert torch.maximum(right - left, bottom - top).min() > 0.97


def test_flips_happen_as_often_as_asked_for() -> None:
    batch = images(1).expand(1000, 3, 32, 32)
    views = seen(batch, flip_probability=0.3)
    flipped = (views - batch.flip(3) / 255).abs().amax(dim=(1, 2, 3)) < 1e-5
    straight = (views - batch / 255).abs().amax(dim=(1, 2, 3)) < 1e-5
    assert (flipped ^ straight).all()
    assert flipped.float().mean() == pytest.approx(0.3, abs=0.05)


def test_grayscale_and_blur_happen_as_often_as_asked_for() -> None:
    batch = images(1).expand(1000, 3, 32, 32)
    gray = seen(batch, grayscale_probability=0.2)
    colourless = (gray.amax(dim=1) - gray.amin(dim=1)).amax(dim=(1, 2)) < 1e-5
    assert colourless.float().mean() == pytest.approx(0.2, abs=0.04)
    blurred = seen(batch, blur_probability=0.4, blur_radius=[0.5, 2])
    changed = (blurred - batch / 255).abs().amax(dim=(1, 2, 3)) > 1e-5
    assert changed.float().mean() == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_brightness_changes_within_its_bounds_and_as_often_as_asked_for(strength: float) -> None:
    gray = torch.full((2000, 3, 2, 2), 40, dtype=torch.uint8)  # neither contrast nor saturation nor hue moves it
    views = seen(gray, size_crops=[2], color_jitter_probability=0.8, color_jitter_strength=strength)
    factors = views[:, 0, 0, 0] / (40 / 255)
    changed = factors[(factors - 1).abs() > 1e-5]
    assert len(changed) / 2000 == pytest.approx(0.8, abs=0.03)
    assert changed.min() == pytest.approx(1 - 0.8 * strength, abs=0.01)
    assert changed.max() == pytest.approx(1 + 0.8 * strength, abs=0.01)
    assert changed.mean() == pytest.approx(1, abs=0.04)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colour_operations_agree_with_torchvision_image_by_image(name: str) -> None:
    batch = torch.rand(8, 3, 16, 16)
    batch[0] = batch[0].mean(dim=0)  # gray: no hue, no saturation
    batch[1] = batch[1].round()  # pure colours, black and white
    amounts = torch.linspace(-0.5, 0.5, 8) if name == "hue" else torch.linspace(0, 1.9, 8)
    changed = getattr(color, f"adjust_{name}")(batch, amounts)
    for image, amount, expected in zip(batch, amounts.tolist(), changed, strict=True):
        torch.testing.assert_close(expected, getattr(functional, f"adjust_{name}")(image, amount), atol=2e-5, rtol=0)


def test_grayscale_agrees_with_torchvision() -> None:
    batch = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(color.grayscale(batch), functional.rgb_to_grayscale(batch), atol=1e-6, rtol=0)


def test_blur_agrees_with_torchvision_away_from_the_border() -> None:
    batch, sigmas = torch.rand(3, 3, 48, 48), (0.3, 1.0, 2.0)
    blurred = gaussian_blur(batch, torch.tensor(sigmas))
    for index, sigma in enumerate(sigmas):
        expected = functional.gaussian_blur(batch[index], [23, 23], [sigma, sigma])
        torch.testing.assert_close(blurred[index, :, 12:-12, 12:-12], expected[:, 12:-12, 12:-12], atol=1e-5, rtol=0)


def test_blur_keeps_constant_images_and_does_nothing_at_zero() -> None:
    torch.testing.assert_close(gaussian_blur(torch.ones(1, 3, 8, 8), torch.tensor([2.0])), torch.ones(1, 3, 8, 8))
    batch = torch.rand(2, 3, 8, 8)
    assert torch.equal(gaussian_blur(batch, torch.zeros(2)), batch)


def test_preset_names_stand_for_the_published_variants() -> None:
    published = {"multicrop_2x224_6x96": ((2, 6), (224, 96)), "multicrop_2x224_4x96": ((2, 4), (224, 96)),
                 "multicrop_2x160_4x96": ((2, 4), (160, 96)), "multicrop_6x160": ((6,), (160,)),
                 "multicrop_2x224": ((2,), (224,))}
    assert published.keys() == PRESETS.keys()
    for name, (counts, sizes) in published.items():
        made = validate(Data, {"transforms": name}).transforms
        assert (made.num_crops, made.size_crops, made.total_num_crops) == (counts, sizes, sum(counts))
    assert validate(Data, {"transforms": "multicrop_2x224"}).transforms.crop_scales == ((0.08, 1.0),)
    assert validate(Data, {}).transforms == validate(Data, {"transforms": "multicrop_2x224_6x96"}).transforms


@pytest.mark.parametrize(("options", "expected"), [
    ("multicrop_2x224_5x96", "Did you mean 'multicrop_2x224_6x96'"),
    ({"num_crops": [2, 4]}, "total_num_crops = 6"),
    ({"size_crops": [224]}, "one entry per size"),
    ({"crop_scales": [[0.5, 1.5], [0.1, 0.2]]}, "at most 1"),
    ({"crop_scales": [[0.5, 0.2], [0.1, 0.2]]}, "low <= high"),
])
def test_transforms_that_make_no_sense_are_bad_input(options: object, expected: str) -> None:
    with pytest.raises(BadInput, match=expected):
        validate(Data, {"transforms": options})
