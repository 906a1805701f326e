"""Images by number, from files and from memory."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.io import write_jpeg, write_png

from training.data.config import Data, Synthetic
from training.data.folder import find_images
from training.data.sources import FolderSource, open_source, read_image
from training.errors import BadInput


def painted(red: int, green: int, blue: int, height: int = 20, width: int = 30) -> Tensor:
    return torch.tensor([red, green, blue], dtype=torch.uint8)[:, None, None].expand(3, height, width).contiguous()


def open_folder(folder: Path, **options: int) -> FolderSource:
    return FolderSource(find_images(folder, "train"), image_size=16, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images of brightness 0, 50, 100, 150, under names that sort in that order, and nothing held out."""
    for number in range(4):
        write_png(painted(*[50 * number] * 3), str(tmp_path / f"{number}.png"))
    return tmp_path


def test_images_come_in_the_order_asked_for(folder: Path) -> None:
    images = open_folder(folder).images([2, 0, 2])
    assert images.shape == (3, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == [100, 0, 100]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_image_becomes_rgb(tmp_path: Path, mode: str) -> None:
    from PIL import Image
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    if mode == "I;16":
        Image.new(mode, (30, 20), 102 * 257).save(path)
    else:
        Image.new("RGB", (30, 20), (102, 102, 102)).convert(mode).save(path)
    image = read_image(path, 16)
    assert image.shape == (3, 16, 16)
    assert image.dtype == torch.uint8
    torch.testing.assert_close(image, torch.full_like(image, 102), atol=3, rtol=0)


def test_the_middle_of_a_jpeg_is_kept(tmp_path: Path) -> None:
    left, middle, right = painted(200, 0, 0, 40, 20), painted(0, 200, 0, 40, 40), painted(0, 0, 200, 40, 20)
    write_jpeg(torch.cat([left, middle, right], dim=2), str(tmp_path / "image.jpg"), quality=95)
    inner = read_image(tmp_path / "image.jpg", 20)[:, :, 2:-2].float().mean(dim=(1, 2))
    torch.testing.assert_close(inner, torch.tensor([0.0, 200.0, 0.0]), atol=10, rtol=0)


def test_downsizing_averages_rather_than_picks_pixels(tmp_path: Path) -> None:
    stripes = (torch.arange(64) % 2 * 255).to(torch.uint8).expand(3, 64, 64).contiguous()
    write_png(stripes, str(tmp_path / "image.png"))
    image = read_image(tmp_path / "image.png", 8)
    assert (image.int() - 127).abs().max() < 10


@pytest.mark.parametrize("broken", [b"", b"no image at all", b"\x89PNG\r\n\x1a\ncut off"])
def test_corrupt_file_is_replaced_counted_and_named_once(
        folder: Path, broken: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "1.png").write_bytes(broken)
    source = open_folder(folder)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert source.images([0, 1, 1, 3])[:, 0, 0, 0].tolist() == [0, 100, 100, 150]
    assert source.skipped == {1: str(folder / "1.png")}
    assert [record.getMessage().count("1.png") for record in caplog.records] == [1]


def test_cut_off_file_is_corrupt_too(folder: Path) -> None:
    whole = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(whole[:len(whole) // 2])
    source = open_folder(folder)
    assert source.images([3])[0, 0, 0, 0] == 0, "the first image stands in for the last"
    assert len(source.skipped) == 1


def test_folder_of_nothing_but_corrupt_files_is_bad_input(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(BadInput, match=r"none of the 4 images .* can be read"):
        open_folder(folder).images([0])


@pytest.mark.parametrize(("cache_bytes", "remembered"), [(4 * 3 * 16 * 16, True), (4 * 3 * 16 * 16 - 1, False)])
def test_images_are_remembered_if_all_of_them_fit(folder: Path, cache_bytes: int, remembered: bool) -> None:
    source = open_folder(folder, cache_bytes=cache_bytes)
    source.images(range(4))
    write_png(painted(250, 250, 250), str(folder / "0.png"))
    assert source.images([0])[0, 0, 0, 0] == (0 if remembered else 250)


def test_labels_follow_the_class_folders(tmp_path: Path) -> None:
    for kind in ("ant", "bee"):
        (tmp_path / kind).mkdir()
        write_png(painted(0, 0, 0), str(tmp_path / kind / "1.png"))
    labels = open_folder(tmp_path).labels
    assert labels is not None
    assert labels.tolist() == [0, 1]


def test_the_experiment_decides_whether_a_folder_is_wanted(folder: Path) -> None:
    made = Data(dataset="synthetic", image_size=16, synthetic=Synthetic(num_train=32, num_val=16))
    own = Data(dataset="image_folder", image_size=16)
    assert open_source(made, None, "val").images([3, 5]).shape == (2, 3, 16, 16)
    assert len(open_source(own, folder, "train")) == 4
    for data, path in ((made, folder), (own, None)):
        with pytest.raises(BadInput, match="--data"):
            open_source(data, path, "train")
