"""What is found wrong with a volunteer's data before training starts."""

import tarfile
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from training.config import validate
from training.data import checks
from training.data.checks import check_data, check_loader, sides
from training.data.config import Data
from training.errors import BadInput

SMALL = {"size_crops": [16, 8]}
OWN = validate(Data, {"dataset": "image_folder", "transforms": SMALL})
MADE = validate(Data, {"dataset": "synthetic", "image_size": 16, "synthetic": {"num_train": 64}, "transforms": SMALL})


def fill(folder: Path, *sizes: tuple[int, int]) -> Path:
    """Two class folders with an image of each of these widths and heights."""
    for kind in ("ant", "bee"):
        (folder / kind).mkdir(exist_ok=True)
        for number, size in enumerate(sizes):
            Image.new("RGB", size).save(folder / kind / f"{number}.jpg")
    return folder


def refusal(data: Data, folder: Path | None, batch_size: int = 4) -> str:
    with pytest.raises(BadInput) as refused:
        check_data(data, folder, batch_size)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_data_that_fit_the_experiment_pass(tmp_path: Path) -> None:
    check_data(OWN, fill(tmp_path, *[(20, 16)] * 5), batch_size=8)
    check_data(MADE, None, batch_size=64)


def test_folder_is_given_exactly_where_one_is_wanted(tmp_path: Path) -> None:
    assert "--data" in refusal(OWN, None)
    assert "Leave out --data" in refusal(MADE, fill(tmp_path, (20, 20)))
    for dataset, wanted in (("cifar10", "cifar-10-batches-py"), ("shards", "tar shards")):
        assert wanted in refusal(validate(Data, {"dataset": dataset, "transforms": SMALL}), None)


def test_batch_that_the_images_cannot_fill_is_bad_input(tmp_path: Path) -> None:
    assert "batch size 9; expected 1 to 8" in refusal(OWN, fill(tmp_path, *[(20, 20)] * 5), 9)
    assert "batch size 65; expected 1 to 64" in refusal(MADE, None, 65)


def test_crops_larger_than_every_image_are_bad_input(tmp_path: Path) -> None:
    message = "crops larger than images: of 16 pixels"
    assert message in refusal(OWN, fill(tmp_path, (100, 15), (15, 100)))
    assert message in refusal(MADE.model_copy(update={"image_size": 15}), None)
    fill(tmp_path, (100, 15), (15, 100), (16, 16))
    check_data(OWN, tmp_path, batch_size=4)


def test_crops_larger_than_cifars_images_are_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "check_cifar10", lambda folder: None)
    data = validate(Data, {"dataset": "cifar10", "transforms": {"size_crops": [33, 8]}})
    assert "of 33 pixels, and the images of data.dataset = 'cifar10' have 32 at most" in refusal(data, Path())


def test_crops_larger_than_the_images_in_shards_are_bad_input(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for number in range(4):
            image = BytesIO()
            Image.new("RGB", (30, 20)).save(image, "JPEG")
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = len(image.getvalue())
            tar.addfile(member, BytesIO(image.getvalue()))
    for size, fits in ((20, True), (21, False)):
        data = validate(Data, {"dataset": "shards", "transforms": {"size_crops": [size, 8]}})
        if fits:
            check_data(data, tmp_path, batch_size=4)
        else:
            assert f"of {size} pixels" in refusal(data, tmp_path)


def test_sizes_are_read_from_headers_of_a_few_files_spread_over_the_folder(tmp_path: Path) -> None:
    paths = []
    for number in range(100):
        paths.append(tmp_path / f"{number}.png")
        Image.new("L", (200 + number, 100 + number)).save(paths[-1])
    paths[0].write_bytes(b"corrupt")
    found = sides(len(paths), paths.__getitem__)
    assert len(found) == checks.SAMPLE - 1
    assert min(found) < 110
    assert max(found) > 185


def test_classifier_of_another_number_of_classes_is_bad_input(tmp_path: Path) -> None:
    data = OWN.model_copy(update={"num_classes": 3})
    assert "images of 2 classes; expected 3" in refusal(data, fill(tmp_path, *[(20, 20)] * 5))
    check_data(OWN.model_copy(update={"num_classes": 2}), tmp_path, 4)


def test_dali_that_is_not_installed_is_bad_input_with_the_mend(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"covey\[dali\]"):
        check_data(OWN, fill(tmp_path, *[(20, 20)] * 5), 4, "dali")


def test_dali_has_nothing_to_decode_in_memory() -> None:
    with pytest.raises(BadInput, match="in memory: nothing to decode"):
        check_loader(Data(dataset="synthetic"), "dali")
