"""Shards copied to a local disk: as many as allowed, checked, resumed, and the rest read where it lies."""

import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from image_folder import write_images

from training.data import checked_copy, preload
from training.data.manifest import Packing, read_manifest
from training.data.preload import Preloaded
from training.data.shard_files import find_shards
from training.data.shard_making import make_shards
from training.data.shards import open_shards
from training.errors import BadInput

EVERYTHING = 1 << 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """4 shards to train on and 1 to evaluate on."""
    write_images(tmp_path / "images", train=20, val=4)
    make_shards(tmp_path / "images", tmp_path / "shards", Packing(images_per_shard=5))
    return tmp_path / "shards"


def load(folder: Path, capacity_bytes: int = EVERYTHING) -> Preloaded:
    return preload.preload(folder, folder.parent / "local", capacity_bytes)


def copies(loaded: Preloaded) -> list[str]:
    found = (path for path in loaded.folder.rglob("*.tar") if not path.is_symlink())
    return sorted(str(path.relative_to(loaded.folder)) for path in found)


def contents(folder: Path) -> list[bytes]:
    source = open_shards(folder, "train", threads=1)
    return [source.read(number) for number in range(len(source))]


def size(folder: Path, number: int) -> int:
    return (folder / "train" / f"{number:06}.tar").stat().st_size


def test_everything_that_fits_is_copied_and_read_from_the_copy(folder: Path) -> None:
    loaded = load(folder)
    assert (loaded.copied, loaded.shards) == (5, 5)
    assert loaded.num_bytes == sum(path.stat().st_size for path in folder.rglob("*.tar"))
    assert copies(loaded) == ["train/000000.tar", "train/000001.tar", "train/000002.tar", "train/000003.tar",
                              "val/000000.tar"]
    expected = contents(folder)
    folder.rename(folder.with_name("unmounted"))
    assert contents(loaded.folder) == expected
    assert find_shards(loaded.folder, "val").count == 4


@pytest.mark.parametrize("allowed", [0, 1, 2, 3])
def test_no_more_is_copied_than_allowed_and_all_is_read(folder: Path, allowed: int) -> None:
    loaded = load(folder, sum(size(folder, number) for number in range(allowed)) + 1)
    assert copies(loaded) == [f"train/{number:06}.tar" for number in range(allowed)]
    assert loaded.copied == allowed
    assert contents(loaded.folder) == contents(folder)
    assert find_shards(loaded.folder, "train").labels == find_shards(folder, "train").labels


def test_whole_copies_are_kept_and_the_bound_may_change(folder: Path) -> None:
    two = size(folder, 0) + size(folder, 1)
    loaded = load(folder, two)
    before = {path: path.stat().st_ino for path in loaded.folder.rglob("*.tar") if not path.is_symlink()}
    assert load(folder).copied == 5
    assert {path: path.stat().st_ino for path in before} == before
    assert load(folder, two).copied == 2
    assert copies(loaded) == ["train/000000.tar", "train/000001.tar"], "a lower bound frees the disk again"
    assert contents(loaded.folder) == contents(folder)


def test_copies_of_other_shards_count_towards_the_bound(folder: Path, tmp_path: Path) -> None:
    taken = load(folder).num_bytes
    make_shards(tmp_path / "images", tmp_path / "other", Packing(images_per_shard=5, seed=1))
    other = preload.preload(tmp_path / "other", tmp_path / "local", taken + size(tmp_path / "other", 0))
    assert copies(other) == ["train/000000.tar"]
    assert contents(other.folder) == contents(tmp_path / "other"), "shards of one name are told apart"



def test_a_copy_that_was_cut_short_goes_on_where_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked_copy, "CHUNK_BYTES", 4096)
    told = list[int]()

    def cut(done: int, _total: int) -> None:
        told.append(done)
        if done > size(folder, 0) + 2 * 4096:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preload.preload(folder, folder.parent / "local", EVERYTHING, cut)
    [part] = (folder.parent / "local").rglob(".*.part")
    assert part.name == ".000001.tar.part"
    there, told = part.stat().st_size, list[int]()
    loaded = preload.preload(folder, folder.parent / "local", EVERYTHING, lambda done, _: told.append(done))
    assert told[0] == size(folder, 0), "the first shard was there"
    assert told[1] == size(folder, 0) + there + 4096, "and a part of the second"
    assert told == sorted(told), "and no byte twice"
    assert told[-1] == loaded.num_bytes
    assert loaded.copied == 5
    assert contents(loaded.folder) == contents(folder)


@pytest.mark.parametrize("left", [b"wrong from the start", b"x" * 100_000])
def test_a_wrong_part_is_begun_anew(folder: Path, left: bytes) -> None:
    loaded = load(folder, 0)
    (loaded.folder / "train" / ".000000.tar.part").write_bytes(left)
    assert load(folder).copied == 5
    assert contents(loaded.folder) == contents(folder)
    assert not list(loaded.folder.rglob(".*.part"))


def test_a_shard_that_is_not_the_manifests_is_bad_input(folder: Path) -> None:
    with (folder / "train" / "000002.tar").open("r+b") as file:
        file.seek(700)
        file.write(b"?")
    manifest = read_manifest(folder / "train")
    assert manifest is not None
    with pytest.raises(BadInput, match=rf"000002\.tar' with SHA-256 .*expected {manifest.shards[2].sha256}"):
        load(folder)
    assert not list((folder.parent / "local").rglob(".*.part"))


def test_missing_and_cut_shards_are_bad_input(folder: Path) -> None:
    path = folder / "train" / "000001.tar"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(BadInput, match=r"000001\.tar' of .* bytes"):
        load(folder)
    path.unlink()
    with pytest.raises(BadInput, match=r"000001\.tar' missing"):
        load(folder)
    with pytest.raises(BadInput, match="without shards"):
        load(folder.parent / "images")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_warning_and_the_rest_is_read_where_it_lies(
        folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int) -> None:
    original = checked_copy._append

    def full(origin: Path, part: Path, tick: Callable[[int], None]) -> str:
        digest = original(origin, part, tick)
        if origin.name == "000002.tar":
            raise OSError(code, "no room")
        return digest

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(checked_copy, "_append", full)
        loaded = load(folder)
    assert copies(loaded) == ["train/000000.tar", "train/000001.tar"]
    assert not list(loaded.folder.rglob(".*.part")), "what little room there is is given back"
    assert "the disk is full" in caplog.text
    assert contents(loaded.folder) == contents(folder)
    assert load(folder).copied == 5


def test_some_room_is_left_on_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(preload.shutil, "disk_usage", lambda _: Usage(preload.SPARED_BYTES + size(folder, 0) - 1))
    assert load(folder).copied == 0
    monkeypatch.setattr(preload.shutil, "disk_usage", lambda _: Usage(preload.SPARED_BYTES + size(folder, 0)))
    assert load(folder).copied > 0


def test_a_folder_that_cannot_be_written_to_is_bad_input(folder: Path) -> None:
    (folder.parent / "local").write_text("a file")
    with pytest.raises(BadInput, match=r"preloading .*--preload"):
        load(folder)


def test_of_two_processes_that_preload_into_one_folder_the_second_reads_where_the_shards_lie(
        folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def second(_done: int, _total: int) -> None:
        others.append(load(folder).folder)

    others = list[Path]()
    loaded = preload.preload(folder, folder.parent / "local", EVERYTHING, second)
    assert set(others) == {folder}
    assert "another process is preloading" in caplog.text
    assert loaded.copied == load(folder).copied == 5


def test_tars_made_elsewhere_are_copied_too(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / split / "index.json").unlink()
    flat = folder.with_name("flat")
    flat.mkdir()
    for path in folder.rglob("*.tar"):
        path.rename(flat / f"{path.parent.name}-{path.name}")
    loaded = load(flat, size_of(flat) - 1)
    assert (loaded.copied, loaded.shards) == (4, 5)
    (loaded.folder / ".train-000000.tar.part").write_bytes(b"left, and nothing to check it against")
    (loaded.folder / "train-000000.tar").unlink()
    assert contents(load(flat).folder) == contents(flat)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.tar"))


def test_the_index_is_not_made_again_for_the_copies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from training.data import tar_index
    loaded = load(folder, size(folder, 0))
    monkeypatch.setattr(tar_index, "walk", lambda _: pytest.fail("walked again"))
    assert find_shards(loaded.folder, "train").count == 20
