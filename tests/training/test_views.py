"""The look of views: what is drawn, how often, and that nothing else changes."""

import math

import pytest
import torch
from torch import Tensor

from training.config import validate
from training.data import views
from training.data.batches import Batch
from training.data.draws import seeded
from training.data.looks import draw_looks
from training.data.transforms_config import IMAGENET_MEAN, IMAGENET_STD, Transforms
from training.data.views import Views, normalise

NOTHING = {"total_num_crops": 1, "num_crops": [1], "size_crops": [32], "crop_scales": [[1, 1]],
           "flip_probability": 0, "color_jitter_probability": 0, "grayscale_probability": 0, "blur_probability": 0}


def transforms(**options: object) -> Transforms:
    return validate(Transforms, {**NOTHING, **options})


def images(count: int, size: int = 32) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def batch_of(*crops: Tensor, number: int = 0) -> Batch:
    return Batch(number, list(crops), None, len(crops[0]))


def seen(crops: Tensor, key: str = "me", **options: object) -> Tensor:
    """The views of `crops`, brought back to RGB in [0, 1]."""
    made = Views(transforms(**options), key)(batch_of(crops), "cpu")[0]
    return made * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]


def test_views_are_float_crops_of_the_same_shapes_and_leave_the_crops_alone() -> None:
    crops = [images(8, 24), images(12, 16)]
    before = [crop.clone() for crop in crops]
    made = Views(Transforms(), "me")(batch_of(*crops), "cpu")
    assert [view.shape for view in made] == [(8, 3, 24, 24), (12, 3, 16, 16)]
    assert {view.dtype for view in made} == {torch.float32}
    assert all(torch.equal(*pair) for pair in zip(crops, before, strict=True))


def test_without_any_strength_views_are_the_crops() -> None:
    torch.testing.assert_close(seen(images(8)), images(8) / 255, atol=1e-6, rtol=0)


def test_normalised_are_images_whose_mean_and_deviation_are_taken_out() -> None:
    expected = (images(2) / 255 - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([2, 4, 8])[:, None, None]
    options = transforms(mean=[0.5, 0.4, 0.3], std=[2, 4, 8])
    torch.testing.assert_close(normalise(images(2), options.mean, options.std), expected)
    torch.testing.assert_close(normalise(images(2) / 255, options.mean, options.std), expected)
    torch.testing.assert_close(Views(options, "me")(batch_of(images(2)), "cpu")[0], expected)


def test_equal_key_and_number_give_equal_views_in_any_order_of_calls() -> None:
    def made(look: Views, number: int) -> Tensor:
        return look(batch_of(images(4), number=number), "cpu")[0]

    first, second = Views(Transforms(), "me"), Views(Transforms(), "me")
    made(first, 6)
    assert torch.equal(made(first, 7), made(second, 7))
    assert not torch.equal(made(first, 7), made(first, 8))
    assert not torch.equal(made(first, 7), made(Views(Transforms(), "you"), 7))


def test_views_of_one_image_differ() -> None:
    made = Views(Transforms(), "me")(batch_of(images(1).repeat(8, 1, 1, 1)), "cpu")[0]
    assert len({tuple(view.flatten().tolist()) for view in made}) == 8


@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_a_view_depends_neither_on_the_other_crops_nor_on_how_many_are_made_at_once(
        at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    crops = images(8)
    alone = crops.clone()
    alone[1:] = 0
    apart = Views(Transforms(), "me")(batch_of(alone), "cpu")[0][0]
    monkeypatch.setattr(views, "CACHE_BYTES", at_once * 4 * crops[0].numel())
    together = Views(Transforms(), "me")(batch_of(crops), "cpu")[0][0]
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=0)


def test_flips_happen_as_often_as_asked_for() -> None:
    crops = images(1).expand(1000, 3, 32, 32)
    made = seen(crops, flip_probability=0.3)
    flipped = (made - crops.flip(3) / 255).abs().amax(dim=(1, 2, 3)) < 1e-5
    straight = (made - crops / 255).abs().amax(dim=(1, 2, 3)) < 1e-5
    assert (flipped ^ straight).all()
    assert flipped.float().mean() == pytest.approx(0.3, abs=0.05)


def test_grayscale_and_blur_happen_as_often_as_asked_for() -> None:
    crops = images(1).expand(1000, 3, 32, 32)
    gray = seen(crops, grayscale_probability=0.2)
    colourless = (gray.amax(dim=1) - gray.amin(dim=1)).amax(dim=(1, 2)) < 1e-5
    assert colourless.float().mean() == pytest.approx(0.2, abs=0.04)
    blurred = seen(crops, blur_probability=0.4, blur_radius=[0.5, 2])
    changed = (blurred - crops / 255).abs().amax(dim=(1, 2, 3)) > 1e-5
    assert changed.float().mean() == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_brightness_changes_within_its_bounds_and_as_often_as_asked_for(strength: float) -> None:
    gray = torch.full((2000, 3, 2, 2), 40, dtype=torch.uint8)  # neither contrast nor saturation nor hue moves it
    made = seen(gray, color_jitter_probability=0.8, color_jitter_strength=strength)
    factors = made[:, 0, 0, 0] / (40 / 255)
    changed = factors[(factors - 1).abs() > 1e-5]
    assert len(changed) / 2000 == pytest.approx(0.8, abs=0.03)
    assert changed.min() == pytest.approx(1 - 0.8 * strength, abs=0.01)
    assert changed.max() == pytest.approx(1 + 0.8 * strength, abs=0.01)
    assert changed.mean() == pytest.approx(1, abs=0.04)


def test_jitters_come_in_all_orders_alike_and_with_amounts_spread_evenly() -> None:
    looks = draw_looks(Transforms(), 6000, seeded("jitters"))
    orders = [order for order in zip(*looks.stages, strict=True) if order[0] >= 0]
    assert all(set(order) == {-1} for order in zip(*looks.stages, strict=True) if order[0] < 0)
    assert len(set(orders)) == 24
    expected = len(orders) / 24  # its chi-squared has 23 degrees of freedom: above 49.7 once in a thousand seeds
    assert sum((orders.count(order) - expected) ** 2 / expected for order in set(orders)) < 49.7
    amounts = torch.tensor(looks.amounts)
    assert amounts[:3].mean(dim=1).tolist() == pytest.approx([1, 1, 1], abs=0.03)
    assert amounts[:3].std(dim=1).tolist() == pytest.approx([1.6 / math.sqrt(12)] * 3, rel=0.05)
    assert (amounts[3].min().item(), amounts[3].max().item()) == pytest.approx((-0.2, 0.2), abs=0.001)


def test_draws_leave_torchs_own_generator_alone() -> None:
    before = torch.get_rng_state()
    seen(images(4), color_jitter_probability=1, blur_probability=0.5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_views_on_a_gpu_are_those_on_the_processor() -> None:
    batch = batch_of(images(16, 64), images(48, 32))
    for here, there in zip(*(Views(Transforms(), "me")(batch, device) for device in ("cpu", "cuda")), strict=True):
        assert there.is_cuda
        torch.testing.assert_close(here, there.cpu(), atol=1e-4, rtol=0)
