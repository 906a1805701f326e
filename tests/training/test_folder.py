"""Which files of a data folder are trained and evaluated on."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from training.data.folder import Listing, find_images
from training.errors import BadInput


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def names(listing: Listing) -> list[str]:
    return [path.name for path in listing.paths]


def test_class_folders_give_sorted_classes_and_their_labels(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{kind}/{number}.png" for kind in ("zebra", "ant") for number in range(2)))
    listing = find_images(tmp_path, "train")
    assert listing.classes == ("ant", "zebra")
    assert listing.labels == (0, 0, 1, 1)
    assert [path.parent.name for path in listing.paths] == ["ant", "ant", "zebra", "zebra"]


def test_images_deep_in_a_class_folder_belong_to_it(tmp_path: Path) -> None:
    touch(tmp_path, "ant/2020/may/1.JPG", "zebra/1.jpeg")
    assert find_images(tmp_path, "train").labels == (0, 1)


def test_only_visible_jpeg_and_png_files_count(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png", "a/2.txt", "a/.3.png", ".cache/4.png", "a/5.JPEG", "a/6.jpg", "a/7.gif")
    assert names(find_images(tmp_path, "train")) == ["1.png", "5.JPEG", "6.jpg"]


@pytest.mark.parametrize("stray", ["", "ant/9.png"])
def test_images_outside_class_folders_make_the_folder_flat(tmp_path: Path, stray: str) -> None:
    touch(tmp_path, "1.png", "2.png", *([stray] if stray else []))
    listing = find_images(tmp_path, "train")
    assert listing.labels is None
    assert listing.classes is None
    assert len(listing.paths) == (3 if stray else 2)


def test_train_and_val_folders_are_the_splits(tmp_path: Path) -> None:
    touch(tmp_path, "train/ant/1.png", "train/bee/2.png", "val/ant/3.png", "val/bee/4.png", "other/5.png")
    assert names(find_images(tmp_path, "train")) == ["1.png", "2.png"]
    val = find_images(tmp_path, "val")
    assert names(val) == ["3.png", "4.png"]
    assert val.labels == (0, 1)


@pytest.mark.parametrize(("files", "odd"), [
    (("train/ant/1.png", "train/bee/2.png", "val/bee/3.png"), r"1 only in train \(ant\);"),
    (("train/ant/1.png", "val/ant/2.png", "val/bee/3.png"), r"1 only in val \(bee\);"),
    (("train/ant/1.png", "val/Ant/2.png"), r"1 only in train \(ant\) and 1 only in val \(Ant\);"),
    ((*(f"train/{number}/1.png" for number in range(9)), "val/0/2.png"), r"8 only in train \(1, 2, 3, \.\.\.\);"),
])
def test_classes_that_differ_between_train_and_val_are_bad_input(
        tmp_path: Path, files: tuple[str, ...], odd: str) -> None:
    touch(tmp_path, *files)
    for split in ("train", "val"):
        with pytest.raises(BadInput, match=f"whose train and val classes differ: {odd}"):
            find_images(tmp_path, split)  # type: ignore[arg-type]


def test_class_of_which_too_little_is_there_to_hold_anything_out_is_no_difference(tmp_path: Path) -> None:
    touch(tmp_path, "bee/1.png", *(f"ant/{number}.png" for number in range(5)))
    assert find_images(tmp_path, "train").labels == (0, 0, 0, 0, 1)
    assert find_images(tmp_path, "val").labels == (0,)


def test_beside_a_val_folder_all_else_is_train(tmp_path: Path) -> None:
    touch(tmp_path, *(f"ant/{number}.png" for number in range(10)), "val/ant/10.png")
    assert len(find_images(tmp_path, "train").paths) == 10
    assert names(find_images(tmp_path, "val")) == ["10.png"]


@pytest.mark.parametrize("below", ["", "train/"])
def test_without_val_a_fifth_of_each_class_is_held_out(tmp_path: Path, below: str) -> None:
    touch(tmp_path, *(f"{below}ant/{number}.png" for number in range(50)),
          *(f"{below}bee/{number}.png" for number in range(10)))
    train, val = find_images(tmp_path, "train"), find_images(tmp_path, "val")
    assert Counter(train.labels) == {0: 40, 1: 8}
    assert Counter(val.labels) == {0: 10, 1: 2}
    assert not set(train.paths) & set(val.paths)


def test_held_out_images_depend_on_names_alone(tmp_path: Path) -> None:
    files = [f"ant/{number}.png" for number in range(50)]
    touch(tmp_path / "one", *files)
    touch(tmp_path / "two", *reversed(files))
    assert names(find_images(tmp_path / "one", "val")) == names(find_images(tmp_path / "two", "val"))


def test_missing_empty_or_wrong_folder_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, found in (("nowhere", "missing"), ("empty", "without images"), ("file", "not a folder")):
        with pytest.raises(BadInput, match=found):
            find_images(tmp_path / name, "train")


def test_listing_does_not_import_torch() -> None:
    code = "import sys, training.data.checks, training.evaluation_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
