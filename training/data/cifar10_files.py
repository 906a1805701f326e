"""CIFAR-10 as published: six python pickles, read without running what they ask for. Imports no torch.

Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009; the "python version" of the data set.
"""

import pickle
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy
from numpy.typing import NDArray

from training.data.folder import Split
from training.errors import BadInput

FOLDER = "cifar-10-batches-py"
BATCHES: dict[Split, tuple[str, ...]] = {"train": tuple(f"data_batch_{n}" for n in range(1, 6)), "val": ("test_batch",)}
META = "batches.meta"
SIDE, CLASSES, IMAGES_PER_BATCH = 32, 10, 10_000
FILE_BYTES = 40_000_000  # a published batch has 31 million; more would not be one

NUMPY_NAMES = {(module, name) for module, name in (
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"), ("numpy", "dtype"))}


def read_cifar10(folder: Path, split: Split) -> tuple[NDArray[numpy.uint8], NDArray[numpy.int64], tuple[str, ...]]:
    """Images uint8 [N, 3, 32, 32] in RGB, labels int64 [N] and the classes' names; `val` is the published test set.

    `folder` is cifar-10-batches-py or its parent. Raises BadInput for anything but the published files' contents.
    """
    base = _base(folder)
    classes = _classes(base / META)
    parts = [_batch(base / name) for name in BATCHES[split]]
    images, labels = (numpy.concatenate(columns) for columns in zip(*parts, strict=True))
    return images, labels, classes


def check_cifar10(folder: Path) -> None:
    """Raises BadInput unless all six files are there; of the batches nothing is read yet."""
    base = _base(folder)
    _classes(base / META)
    for path in (base / name for names in BATCHES.values() for name in names):
        if not path.is_file():
            raise _foreign(path, "missing")


def _base(folder: Path) -> Path:
    for base in (folder, folder / FOLDER):
        if (base / META).is_file():
            return base
    raise BadInput(f"data folder {str(folder)!r} without {META}", expected=f"{FOLDER} or the folder that it lies in",
                   mend="Unpack cifar-10-python.tar.gz and give its folder with --data.")


def _classes(path: Path) -> tuple[str, ...]:
    names = _load(path).get("label_names")
    if not isinstance(names, list) or len(names) != CLASSES or not all(isinstance(name, str) for name in names):
        raise _foreign(path, f"without a list of {CLASSES} label_names")
    return tuple(names)


def _batch(path: Path) -> tuple[NDArray[numpy.uint8], NDArray[numpy.int64]]:
    content = _load(path)
    images, labels = _pixels(path, content.get("data")), content.get("labels")
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < CLASSES for label in labels):
        raise _foreign(path, f"without a list of labels from 0 to {CLASSES - 1}")
    if len(labels) != len(images):
        raise _foreign(path, f"with {len(images)} images and {len(labels)} labels")
    return images, numpy.array(labels, dtype=numpy.int64)


def _pixels(path: Path, array: object) -> NDArray[numpy.uint8]:
    """What numpy would make of the recorded state: (version, shape, dtype, whether columns come first, bytes)."""
    match array:
        case _Recorded(state=(_, (int() as count, int() as width), _Recorded(arguments=("u1" | "|u1", *_)),
                              bool(by_columns), (str() | bytes()) as raw)):
            pixels = raw.encode("latin1") if isinstance(raw, str) else raw
            if 0 < count <= IMAGES_PER_BATCH and width == 3 * SIDE * SIDE and len(pixels) == count * width:
                order: Literal["F", "C"] = "F" if by_columns else "C"
                flat = numpy.frombuffer(pixels, numpy.uint8).reshape((count, width), order=order)
                return flat.reshape(count, 3, SIDE, SIDE)
    raise _foreign(path, f"without data of up to {IMAGES_PER_BATCH} images of {3 * SIDE * SIDE} bytes")


def _load(path: Path) -> dict[Any, Any]:
    """The dict in the pickle at `path`, keys as text."""
    try:
        with path.open("rb") as file:
            encoded = file.read(FILE_BYTES + 1)
    except OSError as error:
        raise _foreign(path, error.strerror or "unreadable") from None
    if len(encoded) > FILE_BYTES:
        raise _foreign(path, f"of more than {FILE_BYTES} bytes")
    try:
        content = _Reader(BytesIO(encoded), encoding="latin1").load()
    except _RefusedError as error:
        raise _foreign(path, f"which asks for {error}") from None
    except Exception as error:  # a broken pickle raises whatever its broken place leads to
        raise _foreign(path, f"which cannot be read: {type(error).__name__}") from None
    if not isinstance(content, dict):
        raise _foreign(path, "which holds no dict")
    return {_text(key): [_text(item) for item in value] if isinstance(value, list) else value
            for key, value in content.items()}


def _text(item: object) -> object:
    return item.decode("latin1") if isinstance(item, bytes) else item


def _foreign(path: Path, found: str) -> BadInput:
    return BadInput(f"CIFAR-10 file {str(path)!r} {found}", expected="a file of CIFAR-10's published python version",
                    mend="Unpack cifar-10-python.tar.gz, fetched anew from its publisher.")


class _RefusedError(Exception):
    """The pickle wants what these files have no use for."""


class _Recorded:
    """Stands for everything of numpy that the pickles name: remembers what it is made of, and does nothing."""

    __slots__ = ("arguments", "state")

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __call__(self, *arguments: object) -> "_Recorded":
        return _Recorded(*arguments)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reader(pickle._Unpickler):
    """The unpickler written in Python: a hostile memo index costs it a dict's entry, the one in C gigabytes."""

    # protocol 5's, which sets aside whatever length a file claims; the published files are of protocol 2
    dispatch: ClassVar = {code: read for code, read in pickle._Unpickler.dispatch.items()
                          if code != pickle.BYTEARRAY8[0]}

    def find_class(self, module: str, name: str) -> _Recorded:
        if (module, name) not in NUMPY_NAMES:
            raise _RefusedError(repr(f"{module}.{name}"[:80]))
        return _Recorded()

    def get_extension(self, code: int) -> None:
        raise _RefusedError(f"extension {code}")

    def persistent_load(self, _pid: object) -> None:
        raise _RefusedError("a persistent object")
