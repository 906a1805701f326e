"""Crops: where they are drawn against torchvision's own draws, and how they are cut against its resized_crop."""

import pytest
import torch
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision.transforms.v2 import RandomResizedCrop, functional

from training.config import validate
from training.data.crops import CropDraw, cut, draw_crops, empty_crops
from training.data.resampling import cut_many
from training.data.transforms_config import Transforms


def drawn(batch: int, **options: object) -> CropDraw:
    return draw_crops(validate(Transforms, options), batch, "key", 0)


def photo(height: int = 60, width: int = 80, seed: int = 0) -> Tensor:
    coarse = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(seed))
    return (functional.resize(coarse, [height, width])[0] * 255).to(torch.uint8)


def boxes_of_torchvision(count: int, height: int, width: int, scale: tuple[float, float]) -> Tensor:
    crop, image = RandomResizedCrop(8, scale=scale), torch.empty(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = [crop.make_params([image]) for _ in range(count)]
    return torch.tensor([[box[name] for name in ("top", "left", "height", "width")] for box in found]).T


@pytest.mark.parametrize("scale", [(0.14, 1.0), (0.05, 0.14), (0.9, 1.0)])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (64, 300)])
def test_boxes_have_the_distribution_of_torchvisions(scale: tuple[float, float], height: int, width: int) -> None:
    """Kolmogorov-Smirnov over 2000 boxes each; a chance of 1e-3 per quantity that equal ones be told apart."""
    ours = drawn(2000, total_num_crops=1, num_crops=[1], size_crops=[8], crop_scales=[scale]).boxes(height, width)[:, 0]
    theirs = boxes_of_torchvision(2000, height, width, scale)
    for mine, rival in zip(quantities(ours), quantities(theirs), strict=True):
        assert ks_2samp(mine.numpy(), rival.numpy()).pvalue > 1e-3


def quantities(boxes: Tensor) -> list[Tensor]:
    top, left, height, width = boxes.float()
    return [top, left, height * width, width / height, top + height, left + width]


def test_boxes_lie_within_the_image_whatever_its_shape() -> None:
    for height, width in ((1, 1), (3, 1000), (1000, 3), (32, 32), (375, 500)):
        top, left, rows, columns = drawn(200).boxes(height, width)
        assert min(top.min(), left.min()) >= 0
        assert min(rows.min(), columns.min()) >= 1
        assert (top + rows).max() <= height
        assert (left + columns).max() <= width


def test_image_that_no_box_fits_shows_its_middle_as_in_torchvision() -> None:
    """A tenth as high as wide, and a crop of 0.9 of the area at 4:3 at most: the largest such box."""
    boxes = drawn(5, total_num_crops=1, num_crops=[1], size_crops=[8], crop_scales=[[0.9, 1]]).boxes(30, 300)[:, 0]
    assert boxes.T.tolist() == [[0, 130, 30, 40]] * 5


def test_crops_of_equal_key_and_number_are_equal_and_of_others_not() -> None:
    def first(key: str, number: int) -> list[int]:
        return draw_crops(Transforms(), 4, key, number).boxes(375, 500).flatten().tolist()

    assert first("me/0", 3) == first("me/0", 3)
    assert len({tuple(first(*draw)) for draw in (("me/0", 3), ("me/0", 4), ("me/1", 3), ("you/0", 3))}) == 4


def test_draw_of_one_image_is_its_share_of_the_batches() -> None:
    draw = drawn(4)
    assert torch.equal(draw.of(2).boxes(375, 500)[..., 0], draw.boxes(375, 500)[..., 2])


TWO_SIZES = {"total_num_crops": 3, "num_crops": [2, 1], "size_crops": [24, 40], "crop_scales": [[0.3, 1], [0.1, 0.3]]}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "triangular"])
def test_crops_are_torchvisions_resized_crops_of_their_boxes(interpolation: str) -> None:
    """To within a level: some processors' uint8 path rounds between rows and columns."""
    mode = functional.InterpolationMode("bilinear" if interpolation == "triangular" else interpolation)
    draw, images = drawn(3, interpolation=interpolation, **TWO_SIZES), [photo(seed=seed) for seed in range(3)]
    crops = empty_crops(3, draw)
    for place, image in enumerate(images):
        cut(image, draw, place, crops)
    assert [crop.shape for crop in crops] == [(6, 3, 24, 24), (3, 3, 40, 40)]
    boxes = draw.boxes(60, 80)
    for crop, row in ((0, crops[0][:3]), (1, crops[0][3:]), (2, crops[1])):
        for place, image in enumerate(images):
            expected = functional.resized_crop(image, *boxes[:, crop, place].tolist(), list(row.shape[2:]),
                                               interpolation=mode, antialias=True)
            assert (row[place].int() - expected.int()).abs().max() <= 1


def test_triangular_is_dalis_name_for_antialiased_bilinear() -> None:
    def crops(interpolation: str) -> Tensor:
        draw = drawn(1, interpolation=interpolation, **TWO_SIZES)
        made = empty_crops(1, draw)
        cut(photo(), draw, 0, made)
        return made[0]

    assert torch.equal(crops("triangular"), crops("bilinear"))
    assert not torch.equal(crops("bicubic"), crops("bilinear"))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "triangular"])
@pytest.mark.parametrize("side", [16, 32, 64])
def test_crops_made_at_once_are_those_made_one_by_one(interpolation: str, side: int) -> None:
    """Images in memory go through matrix products, files through torch's resize: one distribution, one result."""
    draw = drawn(4, interpolation=interpolation, **TWO_SIZES)
    images = torch.stack([photo(side, side, seed) for seed in range(4)])
    one_by_one = empty_crops(4, draw)
    for place, image in enumerate(images):
        cut(image, draw, place, one_by_one)
    for at_once, each in zip(cut_many(images, draw), one_by_one, strict=True):
        difference = (at_once.int() - each.int()).abs()
        assert difference.max() <= 2
        assert (difference > 1).float().mean() < 0.001


def test_downsizing_averages_rather_than_picks_pixels() -> None:
    stripes = (torch.arange(64) % 2 * 255).to(torch.uint8).expand(3, 64, 64).contiguous()
    draw = drawn(1, total_num_crops=1, num_crops=[1], size_crops=[8], crop_scales=[[1, 1]], crop_ratio=[1, 1])
    crops = empty_crops(1, draw)
    cut(stripes, draw, 0, crops)
    assert (crops[0].int() - 127).abs().max() < 10


def test_draws_leave_torchs_own_generator_alone() -> None:
    before = torch.get_rng_state()
    drawn(4)
    assert torch.equal(torch.get_rng_state(), before)
