"""Image folders become tar shards that WebDataset reads, and shards become images by number."""

import io
import json
import logging
import subprocess
import sys
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from image_folder import CLASSES, write_images

from training.data import shard_writer, shards
from training.data.config import Data
from training.data.folder import find_images
from training.data.manifest import NAME, Packing, read_manifest
from training.data.open import open_source
from training.data.shard_files import find_shards
from training.data.shard_making import Made, make_shards
from training.data.shards import open_shards
from training.errors import BadInput

Sample = dict[str, bytes]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_images(tmp_path / "images")
    return tmp_path / "images"


def pack(images: Path, name: str = "shards", **options: int) -> tuple[Path, Made]:
    destination = images.parent / name
    return destination, make_shards(images, destination, Packing(**{"images_per_shard": 6, **options}))


def tar(path: Path, samples: dict[str, Sample]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, sample in samples.items():
            for suffix, content in sample.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def files(images: Path, count: int) -> list[bytes]:
    return [path.read_bytes() for path in find_images(images, "train").paths[:count]]


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def brightness(source: shards.EncodedSource) -> list[int]:
    return source.images(range(len(source)), 8, 8)[:, 0, 4, 4].tolist()


def test_shards_are_what_webdataset_reads(images: Path) -> None:
    import webdataset
    folder, made = pack(images)
    assert made == Made(images=26, skipped=0, shards=5, num_bytes=sum(p.stat().st_size for p in folder.rglob("*.tar")))
    urls = [str(path) for path in sorted((folder / "train").glob("*.tar"))]
    read = [(sample.get("jpg") or sample["png"], int(sample["cls"]))
            for sample in webdataset.WebDataset(urls, shardshuffle=False)]
    listing = find_images(images, "train")
    assert sorted(read) == sorted((path.read_bytes(), label)
                                  for path, label in zip(listing.paths, listing.labels or (), strict=True))


def test_every_shard_mixes_the_classes_and_equal_seeds_make_equal_shards(images: Path) -> None:
    folder, _ = pack(images)
    labels, tars = find_shards(folder, "train").labels or (), find_shards(folder, "train").index.tars
    for number in range(3):
        assert {label for label, of in zip(labels, tars, strict=True) if of == number} == {0, 1}
    assert read_manifest(pack(images, "again")[0] / "train") == read_manifest(folder / "train")
    assert read_manifest(pack(images, "other", seed=1)[0] / "train") != read_manifest(folder / "train")


def test_shards_are_a_source_like_the_folder(images: Path) -> None:
    folder, _ = pack(images)
    source = open_source(Data(dataset="shards"), folder, "train")
    assert len(source) == 20
    assert source.classes == CLASSES
    assert source.labels is not None
    shown = source.images(range(20), 8, 8)[:, 0, 4, 4]
    assert sorted(shown.tolist()) == pytest.approx([4 * number for number in range(20)], abs=1)
    torch.testing.assert_close((shown + 1) // 4 % 2, source.labels.to(torch.uint8))
    assert len(open_source(Data(dataset="shards"), folder, "val")) == 6


def test_images_come_by_number_from_any_thread_and_more_tars_than_stay_open(
        images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "KEPT_OPEN", 2)
    folder, _ = pack(images, images_per_shard=2)
    before, source = open_files(), open_shards(folder, "train", threads=2)
    expected = [source.read(number) for number in range(20)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, [*range(19, -1, -1)] * 20)) == expected[::-1] * 20
    assert open_files() == before + 2


def test_descriptors_are_closed_with_the_source(images: Path) -> None:
    folder, _ = pack(images)
    before = open_files()
    source = open_shards(folder, "train", threads=1)
    source.read(0)
    assert open_files() == before + 1
    del source
    assert open_files() == before


def test_no_shard_is_larger_than_allowed(images: Path) -> None:
    _, by_count = pack(images, images_per_shard=1)
    assert by_count.shards == 26
    folder, by_bytes = pack(images, "small", images_per_shard=100, max_bytes=12_000)
    assert 3 < by_bytes.shards < 26
    assert max(path.stat().st_size for path in folder.rglob("*.tar")) < 12_000 + 2 * tarfile.RECORDSIZE
    assert pack(images, "tiny", max_bytes=1)[1].shards == 26, "a shard holds one image at least"


def test_large_images_are_shrunk_and_small_ones_left_as_they_are(images: Path) -> None:
    kept = open_shards(pack(images, shortest_side=24)[0], "train", threads=1)
    assert sorted(kept.read(number) for number in range(20)) == sorted(files(images, 20))
    folder, _ = pack(images, "shrunk", shortest_side=12)
    source = open_shards(folder, "train", threads=1)
    from training.data.encoded import decode
    assert {tuple(source.readable(number, decode).shape) for number in range(20)} == {(3, 12, 24)}
    assert Counter(source.read(number)[:4] == b"\x89PNG" for number in range(20)) == {True: 7, False: 13}
    assert sorted(brightness(source)) == pytest.approx(range(0, 80, 4), abs=1)


def test_what_cannot_be_decoded_is_left_out_when_shrinking_counted_and_named(
        images: Path, caplog: pytest.LogCaptureFixture) -> None:
    (images / "train" / "ant" / "000.png").write_bytes(b"nothing")
    (images / "train" / "ant" / "002.JPEG").write_bytes(b"")
    folder, made = pack(images, shortest_side=12)
    assert (made.images, made.skipped) == (24, 2)
    assert len(find_shards(folder, "train").labels or ()) == 18
    assert "000.png" in caplog.text
    assert "002.JPEG" in caplog.text


def test_progress_counts_every_image_once(images: Path) -> None:
    told = []
    make_shards(images, images.parent / "shards", Packing(images_per_shard=6), progress=lambda *at: told.append(at))
    assert told == [(number, 26) for number in range(1, 27)]


def test_a_making_that_was_cut_goes_on_with_whole_shards(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, made = pack(images, "whole")
    written = []

    def fail_at_third(path: Path, sample: object) -> None:
        written.append(path)
        if len(written) == 15:
            raise OSError(28, "No space left on device")

    original = shard_writer.TarWriter.write
    with monkeypatch.context() as patch:
        patch.setattr(shard_writer.TarWriter, "write", lambda tar, sample: (
            fail_at_third(Path(sample["__key__"]), sample), original(tar, sample)))
        with pytest.raises(OSError, match="No space left"):
            pack(images)
    cut = images.parent / "shards" / "train"
    assert sorted(path.name for path in cut.iterdir()) == [".making.jsonl", "000000.tar", "000001.tar"]
    with (cut / ".making.jsonl").open("a") as journal:
        journal.write('{"name": "000002')  # a power cut
    (cut / "000001.tar").write_bytes(b"cut")
    first = (cut / "000000.tar").stat()
    assert pack(images) == (cut.parent, made)
    assert (cut / "000000.tar").stat().st_mtime_ns == first.st_mtime_ns, "what was whole is kept"
    for path in whole.rglob("*.tar"):
        assert (cut.parent / path.relative_to(whole)).read_bytes() == path.read_bytes()
    assert not list(cut.glob(".making*"))


def test_a_finished_making_is_not_repeated(images: Path) -> None:
    folder, made = pack(images)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.tar")}
    assert pack(images)[1] == made
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.tar")} == before


def test_a_destination_with_other_shards_is_left_alone(images: Path) -> None:
    pack(images)
    with pytest.raises(BadInput, match="other images or options"):
        pack(images, seed=1)
    (images / "train" / "ant" / "000.png").unlink()
    with pytest.raises(BadInput, match="other images or options"):
        pack(images)
    tar(images.parent / "foreign" / "train" / "a.tar", {})
    with pytest.raises(BadInput, match="other images or options"):
        pack(images, "foreign")


def test_images_without_classes_make_shards_without_labels(tmp_path: Path) -> None:
    write_images(tmp_path / "sorted", train=4, val=0)
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (tmp_path / "sorted").rglob("*.*"):
        path.rename(flat / path.name)
    folder, made = pack(flat)
    assert (made.images, made.shards) == (4, 1), "too few to hold any out"
    source = open_shards(folder, "train", threads=1)
    assert (source.labels, source.classes) == (None, None)
    with pytest.raises(BadInput, match="without shards to val on"):
        open_shards(folder, "val", threads=1)


@pytest.mark.parametrize("layout", ["{}/a.tar", "imagenet-{}-00.tar"])
def test_tars_made_elsewhere_are_read(images: Path, tmp_path: Path, layout: str) -> None:
    one, two, three = files(images, 3)
    tar(tmp_path / "wds" / layout.format("train"), {
        "a/1": {"cls": b"2", "jpg": one}, "a/2": {"JPEG": two, "json": b'{"label": 1}', "txt": b"a bee"},
        "b/1": {"seg.png": b"another picture", "png": three, "cls": b"02\n"}})
    tar(tmp_path / "wds" / layout.format("validation" if layout[0] == "i" else "val"), {"1": {"jpg": two, "cls": b"4"}})
    source = open_shards(tmp_path / "wds", "train", threads=1)
    assert [source.read(number) for number in range(3)] == [one, two, three]
    assert source.labels is not None
    assert source.labels.tolist() == [2, 1, 2]
    assert source.classes == ("0", "1", "2", "3", "4"), "val shows that there are more"
    val = open_shards(tmp_path / "wds", "val", threads=1)
    assert val.labels is not None
    assert val.labels.tolist() == [4]
    assert val.classes == source.classes


def test_names_longer_than_old_tars_allow_are_read(images: Path, tmp_path: Path) -> None:
    tar(tmp_path / "train" / "a.tar", {f"{'long' * 60}/{number}": {"jpg": content, "cls": b"1"}
                                       for number, content in enumerate(files(images, 2))})
    source = open_shards(tmp_path, "train", threads=1)
    assert [source.read(number) for number in range(2)] == files(images, 2)


@pytest.mark.parametrize(("sample", "found"), [
    ({"jpg": b"", "cls": b"cat"}, "1.cls holds b'cat'"), ({"jpg": b"", "cls": b"-7"}, "holds -7"),
    ({"jpg": b"", "json": b'{"label": "cat"}'}, "1.json holds 'cat'"), ({"jpg": b"", "json": b"{"}, "1.json holds"),
    ({"jpg": b"", "json": b'{"label": true}'}, "holds True"), ({"jpg": b"", "json": b"[" * 100_000}, "1.json holds"),
    ({"jpg": b"", "cls": b" " * (1 << 21)}, "holds 2097152 bytes"), ({"jpg": b""}, "1.jpg without a label"),
    ({"txt": b"", "cls": b"3"}, None)])
def test_labels_that_are_no_numbers_are_bad_input(tmp_path: Path, sample: Sample, found: str | None) -> None:
    tar(tmp_path / "train" / "a.tar", {"0": {"jpg": b"", "cls": b"0"}, "1": sample})
    if found is None:
        assert len(open_shards(tmp_path, "train", threads=1)) == 1, "a label alone is no image"
    else:
        with pytest.raises(BadInput, match=found):
            open_shards(tmp_path, "train", threads=1)


@pytest.mark.parametrize("kept", [0, 100, 512, 700, 3000, -512, -10240])
def test_a_truncated_tar_is_bad_input_wherever_it_ends(images: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "wds" / "train" / "a.tar"
    tar(path, {str(number): {"jpg": content, "cls": b"0"} for number, content in enumerate(files(images, 8))})
    content = path.read_bytes()
    with tarfile.open(path) as archive:
        archive.getmembers()
        end = archive.offset
    path.write_bytes(content[:kept if kept >= 0 else end + 10240 + kept])
    if kept == -512:
        assert len(find_shards(tmp_path / "wds", "train").labels or ()) == 8, "one block of the end mark is enough"
    else:
        with pytest.raises(BadInput, match=r"a\.tar' is cut off or no tar"):
            find_shards(tmp_path / "wds", "train")


def test_a_header_overwritten_in_the_middle_does_not_end_the_tar_in_silence(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "train" / "a.tar"
    tar(path, {str(number): {"jpg": content, "cls": b"0"} for number, content in enumerate(files(images, 8))})
    with tarfile.open(path) as archive:
        at = archive.getmembers()[6].offset
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"x" * 512)
    with pytest.raises(BadInput, match=f"no end mark at byte {at}"):
        find_shards(tmp_path, "train")


def test_missing_cut_and_foreign_shards_are_bad_input(images: Path) -> None:
    folder, _ = pack(images)
    first, second = folder / "train" / "000000.tar", folder / "train" / "000001.tar"
    whole = second.read_bytes()
    second.write_bytes(whole[:-1])
    with pytest.raises(BadInput, match=rf"000001\.tar' of {len(whole) - 1} bytes; expected {len(whole)}"):
        find_shards(folder, "train")
    second.unlink()
    with pytest.raises(BadInput, match=r"000001\.tar' missing"):
        find_shards(folder, "train")
    tar(second, {})
    second.write_bytes(second.read_bytes().ljust(len(whole), b"\0"))
    with pytest.raises(BadInput, match="other images or labels"):
        find_shards(folder, "train")
    assert first.is_file()


@pytest.mark.parametrize("content", ["", "[]", '{"made": "", "classes": null, "shards": []}', '{"shards": 1}',
                                     '{"made": "", "classes": null, "shards": [{"name": "../../a.tar", "images": 1, '
                                     '"num_bytes": 1, "sha256": "' + "0" * 64 + '"}]}'])
def test_a_broken_manifest_is_bad_input(images: Path, content: str) -> None:
    folder, _ = pack(images)
    (folder / "train" / NAME).write_text(content)
    with pytest.raises(BadInput, match=r"manifest .*index\.json"):
        find_shards(folder, "train")


def test_train_and_val_with_other_classes_are_bad_input(images: Path, tmp_path: Path) -> None:
    folder, _ = pack(images)
    (images / "val" / "bee").rename(images / "val" / "wasp")
    (images / "train" / "bee").rename(images / "train" / "wasp")
    other, _ = pack(images, "other")
    (folder / "val").rename(tmp_path / "aside")
    (other / "val").rename(folder / "val")
    with pytest.raises(BadInput, match="train and val classes differ"):
        find_shards(folder, "train")


def test_missing_and_empty_folders_are_bad_input(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    tar(tmp_path / "texts" / "train" / "a.tar", {"1": {"txt": b"hello"}})
    for name, found in (("nowhere", "missing"), ("empty", "without shards"), ("file", "not a folder"),
                        ("texts", "without images")):
        with pytest.raises(BadInput, match=found):
            find_shards(tmp_path / name, "train")


def test_a_corrupt_image_is_skipped_counted_and_named_once(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, _ = pack(images)
    source = open_shards(folder, "train", threads=2)
    path, offset = folder / "train" / "000001.tar", int(source_offset(folder, 8))
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"nothing of an image")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            shown = brightness(source)
    assert shown[8] == shown[9], "the next image stands in"
    [name] = source.skipped.values()
    assert name.startswith(f"{path}: 0000000")
    assert [record.getMessage().count(name) for record in caplog.records] == [1]


def test_a_tar_cut_off_while_it_is_read_costs_its_images_only(images: Path) -> None:
    folder, _ = pack(images)
    source = open_shards(folder, "train", threads=2)
    with (folder / "train" / "000001.tar").open("r+b") as file:
        file.truncate(source_offset(folder, 10) + 10)
    with pytest.raises(OSError, match="10 of"):
        source.read(10)
    assert len(brightness(source)) == 20
    assert sorted(source.skipped) == [10, 11]


def source_offset(folder: Path, number: int) -> int:
    return int(find_shards(folder, "train").index.offsets[number])


def test_the_index_is_kept_and_made_again_when_a_tar_changes(
        images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from training.data import tar_index
    one, two = files(images, 2)
    path = tmp_path / "wds" / "train" / "a.tar"
    tar(path, {"1": {"jpg": one, "cls": b"0"}})
    find_shards(tmp_path / "wds", "train")
    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "walk", lambda _: pytest.fail("walked again"))
        assert find_shards(tmp_path / "wds", "train").count == 1
    tar(path, {"1": {"jpg": one, "cls": b"0"}, "2": {"jpg": two, "cls": b"1"}})
    assert find_shards(tmp_path / "wds", "train").count == 2
    for cache in path.parent.glob(".*.npz"):
        cache.write_bytes(cache.read_bytes()[:-100])
    assert find_shards(tmp_path / "wds", "train").labels == (0, 1)


def test_a_kept_index_cannot_point_outside_its_tars(images: Path) -> None:
    import numpy
    folder, _ = pack(images)
    [cache] = (folder / "train").glob(".*.npz")
    kept = dict(numpy.load(cache))
    expected = find_shards(folder, "train").index.offsets.tolist()
    for name, value in (("offsets", 1 << 40), ("offsets", -1), ("sizes", 1 << 40), ("tars", 7)):
        wrong = kept | {name: numpy.full_like(kept[name], value)}
        numpy.savez(cache, **wrong)
        assert find_shards(folder, "train").index.offsets.tolist() == expected


def test_a_folder_that_cannot_be_written_to_is_read(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from training.data import tar_index
    folder, _ = pack(images)
    for cache in folder.rglob(".*.npz"):
        cache.unlink()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tar_index.numpy, "savez", refuse)
    assert find_shards(folder, "train").count == 20
    assert not list(folder.rglob(".*.npz"))


def test_the_manifest_holds_counts_sizes_and_digests(images: Path) -> None:
    from hashlib import sha256
    folder, _ = pack(images)
    manifest = json.loads((folder / "train" / NAME).read_text())
    assert manifest["classes"] == list(CLASSES)
    assert [shard["images"] for shard in manifest["shards"]] == [6, 6, 6, 2]
    for shard in manifest["shards"]:
        content = (folder / "train" / shard["name"]).read_bytes()
        assert (shard["num_bytes"], shard["sha256"]) == (len(content), sha256(content).hexdigest())


def test_finding_shards_imports_no_torch() -> None:
    code = "import sys, training.data.shard_files, training.data.preload; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_batches_of_shards_resume_where_they_were(images: Path) -> None:
    from training.data.batches import batches
    from training.data.config import Transforms
    transforms = Transforms(total_num_crops=2, num_crops=(2,), size_crops=(8,), crop_scales=((0.2, 1.0),))
    folder, _ = pack(images)
    straight = batches(open_shards(folder, "train", threads=1), transforms, 3, key="peer/0", threads=2)
    expected = [next(straight) for _ in range(9)][5:]
    resumed = batches(open_shards(folder, "train", threads=1), transforms, 3, key="peer/0", start=5, threads=1)
    for one in expected:
        other = next(resumed)
        assert other.number == one.number
        assert torch.equal(other.crops[0], one.crops[0])
        assert one.labels is not None
        assert other.labels is not None
        assert torch.equal(other.labels, one.labels)
    straight.close()
    resumed.close()


KILLED = """
import os, signal, sys
from pathlib import Path
from training.data.manifest import Packing
from training.data.shard_making import make_shards

def make(dies_at):
    def progress(done, total):
        if done == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
    return make_shards(Path(sys.argv[1]), Path(sys.argv[2]), Packing(images_per_shard=6), progress=progress)

for dies_at in (2, 14, 20):  # in its first shard, in a later one, and again having gone on
    pid = os.fork()
    if pid == 0:
        make(dies_at)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
print(make(-1).images)
"""


def test_a_making_that_was_killed_goes_on_all_the_same(images: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(images), str(images.parent / "shards")],
                          capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == f"{pack(images, 'straight')[1].images}\n", done.stderr
