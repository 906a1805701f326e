"""CIFAR-10's published files are read, and nothing that a pickle asks for is done."""

import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from cifar10_folder import CLASSES, batch, python2_pickle, write_cifar10

from training.data.cifar10 import open_cifar10
from training.data.cifar10_files import FILE_BYTES, check_cifar10, read_cifar10
from training.data.config import Data
from training.data.open import open_source
from training.errors import BadInput

FOLDER = "cifar-10-batches-py"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_cifar10(tmp_path / FOLDER)
    return tmp_path


def replace_batch(folder: Path, content: bytes) -> None:
    (folder / FOLDER / "data_batch_3").write_bytes(content)


def test_the_files_of_these_tests_are_what_numpy_itself_reads() -> None:
    written = batch(numpy.arange(3))
    read = pickle.loads(python2_pickle(written), encoding="bytes")
    numpy.testing.assert_array_equal(read.pop(b"data"), written.pop(b"data"))
    assert read == written


def test_images_labels_and_classes_come_as_published(folder: Path) -> None:
    images, labels, classes = read_cifar10(folder, "train")
    assert images.shape == (100, 3, 32, 32)
    assert (images.dtype, labels.dtype) == (numpy.uint8, numpy.int64)
    assert (images[:, 0] == numpy.arange(100)[:, None, None]).all(), "the five batches in their order"
    assert (images[:, 1, 0, 0] == 1).all()
    assert (images[:, 2, 0, 31] == 2).all(), "rows follow each other within a colour"
    assert labels.tolist() == [number % 10 for number in range(100)]
    assert classes == CLASSES


def test_the_test_batch_is_val_and_the_folder_or_its_parent_will_do(folder: Path) -> None:
    for given in (folder, folder / FOLDER):
        check_cifar10(given)
        images, labels, _ = read_cifar10(given, "val")
        assert images[:, 0, 0, 0].tolist() == list(range(100, 120))
        assert labels.tolist() == [number % 10 for number in range(100, 120)]


def test_it_is_a_source_that_experiments_name(folder: Path) -> None:
    data = Data.model_validate({"dataset": "cifar10", "transforms": {
        "total_num_crops": 1, "num_crops": [1], "size_crops": [32], "crop_scales": [[0.2, 1.0]]}})
    source = open_source(data, folder, "train")
    assert source.classes == CLASSES
    assert source.images([7, 0], 32, 32)[:, 0, 5, 5].tolist() == [7, 0]
    assert len(open_cifar10(folder, "val")) == 20


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("text_keys", [True, False])
def test_files_pickled_anew_by_python_3_are_read_too(folder: Path, protocol: int, text_keys: bool) -> None:
    content = batch(numpy.arange(40, 60))
    named = {key.decode(): value for key, value in content.items()} if text_keys else content
    replace_batch(folder, pickle.dumps(named, protocol))
    assert read_cifar10(folder, "train")[0][:, 0, 0, 0].tolist() == list(range(100))


class Hostile:
    """Calls what it is told to when it is unpickled."""

    def __init__(self, function: object, *arguments: object) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[object, ...]:
        return self._call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(("function", "name"), [
    (os.system, "posix.system"), (eval, "builtin"), (subprocess.Popen, "Popen"), (getattr, "getattr")])
def test_hostile_pickle_is_refused_and_not_run(folder: Path, protocol: int, function: object, name: str) -> None:
    marker = folder / "was-run"
    command = f"open({str(marker)!r}, 'w')" if function is eval else f"touch {marker}"
    replace_batch(folder, pickle.dumps({"data": Hostile(function, command), "labels": []}, protocol))
    with pytest.raises(BadInput, match=f"data_batch_3.* asks for .*{name}"):
        read_cifar10(folder, "train")
    assert not marker.exists()


@pytest.mark.parametrize("opcodes", [
    b"\x82\x01", b"Pid\n", b"U\x02idQ",                                # registered extensions, persistent objects
    b"cnumpy\nload\n", b"cnumpy.core.multiarray\nfromfile\n",         # of numpy, but not what the files need
    b"(inumpy\nload\n", b"cnumpy\ndtype.__init__\n"])
def test_everything_but_the_three_names_of_numpy_is_refused(folder: Path, opcodes: bytes) -> None:
    replace_batch(folder, b"\x80\x02" + opcodes + b".")
    with pytest.raises(BadInput, match="which asks for"):
        read_cifar10(folder, "train")


def test_a_pickle_cannot_change_what_the_next_one_meets(folder: Path) -> None:
    attributes = b"(N}U\x0c__setstate__U\x01xst"
    for name in (b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"cnumpy.core.multiarray\n_reconstruct\n"):
        replace_batch(folder, b"\x80\x02" + name + attributes + b"b.")
        with pytest.raises(BadInput):
            read_cifar10(folder, "train")
    write_cifar10(folder / FOLDER)
    assert len(read_cifar10(folder, "train")[0]) == 100


def test_whatever_is_broken_in_a_file_is_bad_input_in_one_line(folder: Path) -> None:
    whole, draw, told = python2_pickle(batch(numpy.arange(2))), random.Random(0), list[str]()
    structure = [at for at in range(len(whole)) if not 60 < at < len(whole) - 60]
    for _ in range(300):
        broken = bytearray(whole[:draw.choice([len(whole), draw.randrange(len(whole))])])
        for at in draw.sample(structure, 3):
            if at < len(broken):
                broken[at] = draw.randrange(256)
        replace_batch(folder, bytes(broken))
        try:
            images = read_cifar10(folder, "train")[0]
        except BadInput as error:
            told.append(str(error))
        else:
            assert images.shape[1:] == (3, 32, 32)
    assert len(told) > 200
    assert not any("\n" in line for line in told)


def test_an_index_of_billions_takes_no_memory(folder: Path) -> None:
    content = python2_pickle(batch(numpy.arange(40, 60)))
    replace_batch(folder, content[:-1] + b"r\xff\xff\xff\x7f.")
    assert len(read_cifar10(folder, "train")[0]) == 100


@pytest.mark.parametrize("change", [
    {b"data": numpy.zeros((20, 3072), dtype=numpy.int16)}, {b"data": numpy.zeros((20, 3071), dtype=numpy.uint8)},
    {b"data": numpy.zeros((20, 3, 1024), dtype=numpy.uint8)}, {b"data": numpy.zeros((0, 3072), dtype=numpy.uint8)},
    {b"data": b"text"}, {b"data": [0] * 20}, {b"labels": [0] * 19}, {b"labels": [10] * 20}, {b"labels": [-1] * 20},
    {b"labels": [b"cat"] * 20}, {b"labels": 3}])
def test_arrays_and_labels_that_are_not_cifar10s_are_bad_input(folder: Path, change: dict[bytes, object]) -> None:
    replace_batch(folder, python2_pickle(batch(numpy.arange(20)) | change))
    with pytest.raises(BadInput, match="data_batch_3"):
        read_cifar10(folder, "train")


@pytest.mark.parametrize("count", [0, 19, 21, 10_001, -1, 1 << 30])
def test_shapes_that_the_bytes_do_not_fill_are_bad_input(folder: Path, count: int) -> None:
    shape, whole = b"(J" + (20).to_bytes(4, "little") + b"J\x00\x0c", python2_pickle(batch(numpy.arange(20)))
    assert whole.count(shape) == 1
    changed = b"(J" + count.to_bytes(4, "little", signed=True) + b"J\x00\x0c"
    replace_batch(folder, whole.replace(shape, changed))
    with pytest.raises(BadInput, match=r"data_batch_3.* without data of up to"):
        read_cifar10(folder, "train")


@pytest.mark.parametrize("content", [[1, 2], 7, {b"fine_labels": [1]}])
def test_other_pickles_are_bad_input(folder: Path, content: object) -> None:
    replace_batch(folder, python2_pickle(content))
    with pytest.raises(BadInput, match="data_batch_3"):
        read_cifar10(folder, "train")


def test_a_file_far_too_large_is_not_even_read(folder: Path) -> None:
    with (folder / FOLDER / "data_batch_3").open("r+b") as file:
        file.truncate(FILE_BYTES + 1)
    with pytest.raises(BadInput, match=f"more than {FILE_BYTES} bytes"):
        read_cifar10(folder, "train")


def test_missing_files_are_told_before_training(folder: Path) -> None:
    (folder / FOLDER / "test_batch").unlink()
    with pytest.raises(BadInput, match=r"test_batch.* missing"):
        check_cifar10(folder)
    with pytest.raises(BadInput, match=r"without batches\.meta.*--data"):
        check_cifar10(folder / "elsewhere")


def test_checking_imports_no_torch() -> None:
    code = "import sys, training.data.cifar10_files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
