"""DALI's crops are torchvision's: the same boxes of the same pixels, on the CPU."""

import io
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("nvidia.dali", reason="DALI is an extra: pip install 'covey[dali]'")

from training.data.config import Transforms
from training.data.crops import draw_crops
from training.data.dali import DaliSource
from training.data.open import open_folder
from training.data.sources import EncodedSource
from training.errors import BadInput

SMALL = Transforms(total_num_crops=5, num_crops=(2, 3), size_crops=(48, 20), crop_scales=((0.14, 1.0), (0.05, 0.14)))


def photo(number: int, width: int = 150, height: int = 110) -> Image.Image:
    """Smooth noise: sharper than a photo, softer than pixels drawn at random."""
    coarse = numpy.random.default_rng(number).integers(0, 256, (height // 10, width // 10, 3), dtype=numpy.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def source_of(files: list[bytes]) -> EncodedSource:
    return EncodedSource(len(files), files.__getitem__, lambda index: f"image {index}", None, None, where="this test")


def dali_alone(source: EncodedSource, threads: int = 1) -> DaliSource:
    """A loader that may leave nothing to torchvision."""
    alone = EncodedSource(len(source), source.read, source.name, None, None, where="this test")
    alone.crops = lambda *_: pytest.fail("DALI refused a batch")
    return DaliSource(alone, threads=threads)


def inner(crops: Tensor) -> Tensor:
    return crops[..., 3:-3, 3:-3]


def check_alike(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Inside a crop both filters see the same pixels; at its border DALI's sees one more."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype == torch.uint8
        difference = (one.int() - other.int()).abs().float()
        assert inner(difference).max() <= 2
        assert difference.mean() < 0.5
        assert difference.max() <= 20


@pytest.mark.parametrize("interpolation", ["bilinear", "triangular", "bicubic"])
def test_same_draws_make_the_same_crops(interpolation: str) -> None:
    source = source_of([encoded(photo(number, 150 - 11 * number, 110 + 9 * number)) for number in range(6)])
    dali = dali_alone(source, threads=2)
    transforms = SMALL.model_copy(update={"interpolation": interpolation})
    for number in range(3):
        draw = draw_crops(transforms, 4, "a peer", number)
        crops = dali.crops([5, 0, 3, 1], draw)
        assert [tuple(group.shape) for group in crops] == [(8, 3, 48, 48), (12, 3, 20, 20)]
        check_alike(crops, source.crops([5, 0, 3, 1], draw))


@pytest.mark.parametrize("make", [
    lambda: encoded(photo(0).convert("L")), lambda: encoded(photo(0).convert("CMYK")),
    lambda: encoded(photo(0), progressive=True), lambda: encoded(photo(0), "PNG"),
    lambda: encoded(photo(0).convert("RGBA"), "PNG"), lambda: encoded(photo(0).convert("LA"), "PNG"),
    lambda: encoded(photo(0).convert("P"), "PNG"),
    lambda: encoded(Image.fromarray(numpy.asarray(photo(0).convert("L")).astype(numpy.uint16) * 257), "PNG"),
    *(lambda turn=turn: encoded(photo(0), exif=orientation(turn)) for turn in range(1, 9))])
def test_every_kind_of_image_and_orientation_is_as_torchvision_has_it(make: Callable[[], bytes]) -> None:
    source = source_of([make()])
    draw = draw_crops(SMALL, 1, "a peer", 0)
    check_alike(dali_alone(source).crops([0], draw), source.crops([0], draw))


def orientation(turn: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif


def test_a_batch_may_be_smaller_or_larger_than_the_last() -> None:
    source = source_of([encoded(photo(number)) for number in range(5)])
    dali = dali_alone(source)
    for count in (2, 5, 1):
        draw = draw_crops(SMALL, count, "a peer", count)
        check_alike(dali.crops(range(count), draw), source.crops(range(count), draw))


def test_several_threads_get_each_its_own_batch() -> None:
    source = source_of([encoded(photo(number)) for number in range(8)])
    dali = dali_alone(source, threads=2)
    draws = [draw_crops(SMALL, 4, "a peer", number) for number in range(8)]

    def crops(number: int) -> list[Tensor]:
        return dali.crops([(number + place) % 8 for place in range(4)], draws[number])

    alone = [crops(number) for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for ours, expected in zip(pool.map(crops, range(8)), alone, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))


@pytest.mark.parametrize("bad", [
    b"", b"nothing of an image", encoded(photo(1))[:2000], encoded(photo(1), "PNG")[:2000]])
def test_corrupt_image_is_replaced_counted_and_named_once(bad: bytes, caplog: pytest.LogCaptureFixture) -> None:
    source = source_of([encoded(photo(0)), bad, encoded(photo(2))])
    dali = DaliSource(source, threads=1)
    draw = draw_crops(SMALL, 3, "a peer", 0)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            check_alike(dali.crops([0, 1, 2], draw), source.crops([0, 2, 2], draw))
    assert dali.skipped == {1: "image 1"}
    source.crops = lambda *_: pytest.fail("once the image is known, the batch is DALI's again")
    dali.crops([0, 1, 2], draw)
    assert [record.getMessage().count("image 1") for record in caplog.records] == [1]


def test_nothing_but_corrupt_images_is_bad_input() -> None:
    with pytest.raises(BadInput, match="none of the 2 images in this test can be read"):
        DaliSource(source_of([b"nothing"] * 2), threads=1).crops([0], draw_crops(SMALL, 1, "a peer", 0))


def test_what_pil_holds_for_a_bomb_is_left_to_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    source = source_of([encoded(photo(0))])
    draw = draw_crops(SMALL, 1, "a peer", 0)
    for ours, theirs in zip(DaliSource(source, threads=1).crops([0], draw), source.crops([0], draw), strict=True):
        assert torch.equal(ours, theirs)


def test_what_is_evaluated_does_not_depend_on_the_loader(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(encoded(photo(number)))
    source = open_folder(tmp_path, "train", threads=1)
    dali = DaliSource(source, threads=1)
    assert (len(dali), dali.labels, dali.classes) == (3, None, None)
    assert torch.equal(dali.images([2, 0], 64, 48), source.images([2, 0], 64, 48))


def test_crops_of_a_whole_image_and_of_a_single_pixel_line_work() -> None:
    source = source_of([encoded(photo(0, 20, 20)), encoded(photo(0).resize((90, 1)))])
    whole = draw_crops(Transforms(total_num_crops=1, num_crops=(1,), size_crops=(20,), crop_scales=((1.0, 1.0),),
                                  crop_ratio=(1.0, 1.0)), 2, "a peer", 0)
    check_alike(dali_alone(source).crops([0, 1], whole), source.crops([0, 1], whole))
