"""`covey shards make` checks its options and says what it made."""

from pathlib import Path

import pytest
import torch
from torchvision.io import write_png

from peer.shards import line, make
from training.data.shard_files import find_shards
from training.errors import BadInput


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in range(10):
        folder = tmp_path / "images" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        write_png(torch.full((3, 8, 8), number, dtype=torch.uint8), str(folder / f"{number}.png"))
    return tmp_path / "images"


def test_images_become_shards_and_are_counted(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    destination = images.parent / "shards"
    made = make(images, destination, {"images_per_shard": 3, "max_bytes": None})
    assert line(made, destination) == f"10 images in 4 shards, 0.00 GiB, in {destination}"
    assert find_shards(destination, "train").count == 8
    assert find_shards(destination, "val").count == 2
    assert "10/10" in capsys.readouterr().err


def test_what_is_left_out_is_said(images: Path) -> None:
    (images / "a" / "0.png").write_bytes(b"")
    made = make(images, images.parent / "shards", {"shortest_side": 4}, quiet=True)
    assert line(made, Path("there")).endswith("in there; 1 left out, which cannot be decoded")


@pytest.mark.parametrize("options", [{"images_per_shard": 0}, {"shortest_side": -1}, {"image_per_shard": 3}])
def test_options_that_make_no_sense_are_bad_input(images: Path, options: dict[str, int]) -> None:
    with pytest.raises(BadInput, match=next(iter(options))):
        make(images, images.parent / "shards", options)
    assert not (images.parent / "shards").exists()
