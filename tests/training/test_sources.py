"""Images by number, from files and from memory."""

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import write_jpeg, write_png

from training.data.config import Data, Synthetic
from training.data.crops import draw_crops
from training.data.encoded import decode
from training.data.open import open_folder, open_source
from training.data.sources import EncodedSource, MemorySource, Source, stand_ins
from training.data.transforms_config import Transforms
from training.errors import BadInput

WHOLE = Transforms(total_num_crops=1, num_crops=(1,), size_crops=(16,), crop_scales=((1.0, 1.0),))


def painted(red: int, green: int, blue: int, height: int = 20, width: int = 30) -> Tensor:
    return torch.tensor([red, green, blue], dtype=torch.uint8)[:, None, None].expand(3, height, width).contiguous()


def shown(source: Source, *indices: int) -> list[int]:
    """Brightness of these images, each of one colour."""
    return source.images(indices, 16, 16)[:, 0, 0, 0].tolist()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images of brightness 0, 50, 100, 150, under names that sort in that order, and nothing held out."""
    for number in range(4):
        write_png(painted(*[50 * number] * 3), str(tmp_path / f"{number}.png"))
    return tmp_path


def test_images_come_in_the_order_asked_for(folder: Path) -> None:
    images = open_folder(folder, "train").images([2, 0, 2], 18, 16)
    assert images.shape == (3, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == [100, 0, 100]


def test_crops_come_in_the_order_asked_for_crop_by_crop(folder: Path) -> None:
    two_sizes = Transforms(total_num_crops=3, num_crops=(2, 1), size_crops=(8, 4), crop_scales=((0.3, 1), (0.1, 0.3)))
    crops = open_folder(folder, "train").crops([2, 0], draw_crops(two_sizes, 2, "me", 0))
    assert [crop.shape for crop in crops] == [(4, 3, 8, 8), (2, 3, 4, 4)]
    assert {crop.dtype for crop in crops} == {torch.uint8}
    assert crops[0][:, 0, 0, 0].tolist() == [100, 0, 100, 0]
    assert crops[1][:, 0, 0, 0].tolist() == [100, 0]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_image_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    if mode == "I;16":
        Image.new(mode, (30, 20), 102 * 257).save(path)
    else:
        Image.new("RGB", (30, 20), (102, 102, 102)).convert(mode).save(path)
    image = decode(path.read_bytes())
    assert image.shape == (3, 20, 30)
    assert image.dtype == torch.uint8
    torch.testing.assert_close(image, torch.full_like(image, 102), atol=3, rtol=0)


def test_photographs_are_turned_as_their_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    Image.new("RGB", (30, 20), (102, 102, 102)).save(tmp_path / "image.jpg", exif=exif)
    assert decode((tmp_path / "image.jpg").read_bytes()).shape == (3, 30, 20)


def test_the_middle_of_an_image_is_evaluated(tmp_path: Path) -> None:
    left, middle, right = painted(200, 0, 0, 40, 20), painted(0, 200, 0, 40, 40), painted(0, 0, 200, 40, 20)
    write_jpeg(torch.cat([left, middle, right], dim=2), str(tmp_path / "image.jpg"), quality=95)
    image = open_folder(tmp_path, "train").images([0], 20, 16)[0]
    torch.testing.assert_close(image.float().mean(dim=(1, 2)), torch.tensor([0.0, 200.0, 0.0]), atol=10, rtol=0)


@pytest.mark.parametrize(("resize_size", "crop_size"), [(32, 28), (64, 56)])
def test_images_for_evaluation_are_those_of_torchvisions_resize_and_centre_crop(
        tmp_path: Path, resize_size: int, crop_size: int) -> None:
    from torchvision.transforms.v2 import functional
    image = torch.randint(0, 256, (3, 50, 75), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_png(image, str(tmp_path / "image.png"))
    for mode in ("bilinear", "bicubic"):
        found = open_folder(tmp_path, "train").images([0], resize_size, crop_size, mode)[0]
        resized = functional.resize(image, [resize_size], functional.InterpolationMode(mode), antialias=True)
        expected = functional.center_crop(resized, [crop_size, crop_size])
        assert (found.int() - expected.int()).abs().max() <= 1


def test_images_in_memory_of_the_size_asked_for_are_given_as_they_are() -> None:
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(MemorySource(images, None).images([2, 1], 16, 16), images[[2, 1]])
    assert MemorySource(images, None).images([2, 1], 12, 8).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("broken", [b"", b"no image at all", b"\x89PNG\r\n\x1a\ncut off"])
def test_corrupt_file_is_replaced_counted_and_named_once(
        folder: Path, broken: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "1.png").write_bytes(broken)
    source = open_folder(folder, "train")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert shown(source, 0, 1, 1, 3) == [0, 100, 100, 150]
            crops = source.crops([0, 1, 1, 3], draw_crops(WHOLE, 4, "me", 0))[0]
            assert crops[:, 0, 0, 0].tolist() == [0, 100, 100, 150]
    assert source.skipped == {1: str(folder / "1.png")}
    assert stand_ins(source, [0, 1, 1, 3]) == [0, 2, 2, 3]
    assert [record.getMessage().count("1.png") for record in caplog.records] == [1]


def test_cut_off_file_is_corrupt_too(folder: Path) -> None:
    whole = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(whole[:len(whole) // 2])
    source = open_folder(folder, "train")
    assert shown(source, 3) == [0], "the first image stands in for the last"
    assert len(source.skipped) == 1
    assert stand_ins(source, [3]) == [0]


def test_folder_of_nothing_but_corrupt_files_is_bad_input(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(BadInput, match=r"none of the 4 images .* can be read"):
        open_folder(folder, "train").images([0], 16, 16)


def test_an_error_of_ours_is_not_taken_for_a_corrupt_file(folder: Path) -> None:
    source = open_folder(folder, "train")
    with pytest.raises(TypeError):
        source.readable(0, lambda encoded: encoded + 1)  # type: ignore[operator]
    assert not source.skipped


def test_labels_follow_the_class_folders(tmp_path: Path) -> None:
    for kind in ("ant", "bee"):
        (tmp_path / kind).mkdir()
        write_png(painted(0, 0, 0), str(tmp_path / kind / "1.png"))
    source = open_folder(tmp_path, "train")
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1]
    assert source.classes == ("ant", "bee")


def test_the_experiment_decides_whether_a_folder_is_wanted(folder: Path) -> None:
    crops = {"size_crops": [16, 8]}
    made = Data.model_validate({"dataset": "synthetic", "image_size": 16, "transforms": crops,
                                "synthetic": Synthetic(num_train=32, num_val=16)})
    own = Data.model_validate({"dataset": "image_folder", "transforms": crops})
    assert open_source(made, None, "val").images([3, 5], 16, 16).shape == (2, 3, 16, 16)
    source = open_source(own, folder, "train")
    assert isinstance(source, EncodedSource)
    assert len(source) == 4
    for data, path in ((made, folder), (own, None)):
        with pytest.raises(BadInput, match="--data"):
            open_source(data, path, "train")


def test_classifier_of_another_number_of_classes_is_bad_input(folder: Path) -> None:
    with pytest.raises(BadInput, match="without classes; expected 3 classes"):
        open_source(Data(num_classes=3), folder, "train")
    (folder / "ant").mkdir()
    for path in folder.glob("*.png"):
        path.rename(folder / "ant" / path.name)
    with pytest.raises(BadInput, match="images of 1 classes; expected 3"):
        open_source(Data(num_classes=3), folder, "train")


def test_an_animation_under_a_picture_s_name_is_corrupt(folder: Path) -> None:
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    path = sorted(folder.glob("*.png"))[0]
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:])
    source = open_folder(folder, "train")
    shown(source, *range(len(source)))
    assert len(source.skipped) <= 1
    with pytest.raises(ValueError, match="animation"):
        decode(path.read_bytes())


def test_an_outage_of_the_disk_is_told_from_corrupt_files() -> None:
    def gone(index: int) -> bytes:
        raise OSError(5, "Input/output error")

    source = EncodedSource(1000, gone, str, None, None, where="data folder '/mnt'")
    with pytest.raises(OSError, match=r"101 images of data folder '/mnt' in a row: .*Input/output error"):
        source.images([0], 8, 8)
    assert len(source.skipped) <= 101
