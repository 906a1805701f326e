"""CIFAR-10's python batches, written as Python 2 wrote the published ones: opcode by opcode, pickle protocol 2."""

import struct
from pathlib import Path

import numpy
from numpy.typing import NDArray

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def python2_pickle(value: object) -> bytes:
    return b"\x80\x02" + _opcodes(value) + b"."


def write_cifar10(folder: Path, images_per_batch: int = 20) -> None:
    """Image n of all 5 batches to train on, and then of the test batch, has n % 251 in red, label n % 10."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate([f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]):
        numbers = numpy.arange(number * images_per_batch, (number + 1) * images_per_batch)
        (folder / name).write_bytes(python2_pickle(batch(numbers)))
    meta = {b"num_cases_per_batch": images_per_batch, b"label_names": [name.encode() for name in CLASSES]}
    (folder / "batches.meta").write_bytes(python2_pickle(meta | {b"num_vis": 3072}))


def batch(numbers: NDArray[numpy.int64]) -> dict[bytes, object]:
    data = numpy.zeros((len(numbers), 3, 1024), dtype=numpy.uint8)
    data[:, 0], data[:, 1, 0], data[:, 2, 31] = (numbers % 251)[:, None], 1, 2
    return {b"batch_label": b"a batch", b"labels": (numbers % 10).tolist(), b"data": data.reshape(-1, 3072),
            b"filenames": [b"%d.png" % number for number in numbers]}


def _opcodes(value: object) -> bytes:
    if isinstance(value, dict):
        return b"}(" + b"".join(_opcodes(key) + _opcodes(item) for key, item in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_opcodes, value)) + b"e"
    if isinstance(value, bytes):
        return (b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    assert isinstance(value, numpy.ndarray)
    return _array(value)


def _array(value: NDArray[numpy.uint8]) -> bytes:
    kind = b"cnumpy\ndtype\n(" + _opcodes(value.dtype.str[1:].encode()) + b"K\x00K\x01tR"
    kind += b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    shape = b"(" + b"".join(_opcodes(extent) for extent in value.shape) + b"t"
    return empty + b"(K\x01" + shape + kind + b"\x89" + _opcodes(value.tobytes()) + b"tb"
