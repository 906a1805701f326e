"""How far apart two peers' parameters are, from 136 bytes each: a linear sketch, and a checksum of every bit.

The sketch is a random projection (Johnson-Lindenstrauss) of the parameters x, put end to end, in two steps:
A_j = sum of t_i x_i over the i that fall on place j of 8192, then s_k = sum of c_kj A_j for k of 32, where t and c are
random signs (t: a table, read from another random offset for every 2^17 values). Then |s(x) - s(y)|^2 / 32 has the mean
|x - y|^2 over the signs, whatever x and y; its variance relative to the square of that is at most
2/32 (1 + w) + w, where w = 2 sum over pairs i != i' on the same place of d_i^2 d_i'^2 / |d|^4, d = x - y
(about 2/8192 if d is spread out; at most 2). A distance is thus right to about an eighth.

Signs come from SHAKE-256, so they are the same everywhere. Products with signs are exact, and sums are element by
element in a fixed order, which IEEE arithmetic rounds alike everywhere: equal parameters give equal bytes (tested with
torch and numpy on processors; not yet between processor and GPU). Rounding to float32 hides distances below some 1e-7
of |x|; the checksum (a multilinear hash of the values' bits, modulo 2^32, twice) shows any change of one value for
certain.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from hashlib import shake_256
from math import sqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

WIDTH = 2**17  # values in a row: accumulators and signs of one row stay in a processor's cache
PLACES = 2**13
OUTPUTS = 32
NBYTES = 4 * (OUTPUTS + 2)


class _Tables(NamedTuple):
    signs: Tensor    # float32 [2 WIDTH]: of row r, from offset r on
    weights: Tensor  # int32 [2 WIDTH], odd: likewise, of the checksum
    mixing: Tensor   # float32 [OUTPUTS, PLACES], signs
    folding: Tensor  # int32 [2, WIDTH], odd


@torch.no_grad()
def sketch(tensors: Iterable[Tensor], seed: int = 0) -> bytes:
    """136 bytes about the values of `tensors`, of any shapes and dtypes, in this order; [] has a sketch too.

    One pass, on the device of the first; only the result is copied to the host. Values count as float32. Peers must
    use one `seed`. Tensors that are not contiguous are copied, one at a time.
    """
    tensors = list(tensors)
    device = tensors[0].device if tensors else torch.device("cpu")
    tables = _tables(seed, device)
    sums = torch.zeros(WIDTH, device=device)
    checksum = torch.zeros(WIDTH, dtype=torch.int32, device=device)
    for piece, place, offset in _pieces(tensors, seed, device):
        end = place + piece.numel()
        sums[place:end].addcmul_(piece, tables.signs[offset + place:offset + end])
        checksum[place:end].addcmul_(piece.view(torch.int32), tables.weights[offset + place:offset + end])
    places = _folded(sums.view(-1, PLACES).T)
    outputs = _folded(tables.mixing * places)
    digest = (checksum * tables.folding).sum(1).to(torch.int32)
    return torch.cat([outputs.view(torch.int32), digest]).cpu().numpy().tobytes()


def distance(a: bytes, b: bytes) -> float:
    """The estimated Euclidean distance of the parameters that `a` and `b` are sketches of; 0 for equal ones.

    NaN if they hold values that are not finite. ValueError for bytes of another length.
    """
    if len(a) != NBYTES or len(b) != NBYTES:
        raise ValueError(f"sketches of {len(a)} and {len(b)} bytes, not {NBYTES}")
    difference = np.subtract(*(np.frombuffer(each, np.float32, OUTPUTS).astype(np.float64) for each in (a, b)))
    return sqrt(float(difference @ difference) / OUTPUTS)


def _pieces(tensors: list[Tensor], seed: int, device: torch.device) -> Iterator[tuple[Tensor, int, int]]:
    """The tensors' values, cut where a row of WIDTH ends: (float32 values, where in the row, the row's offset)."""
    offsets, position = _offsets(seed, -(-sum(tensor.numel() for tensor in tensors) // WIDTH)), 0
    for tensor in tensors:
        flat, start = tensor.to(device, torch.float32).reshape(-1), 0
        while start < flat.numel():
            row, place = divmod(position, WIDTH)
            piece = flat[start:start + WIDTH - place]
            yield piece, place, offsets[row]
            start += piece.numel()
            position += piece.numel()


def _folded(values: Tensor) -> Tensor:
    """The sums over the last dimension, a power of two, by halves: elementwise, so that every device rounds alike."""
    while (half := values.shape[-1] // 2) > 0:
        values = values[..., :half] + values[..., half:]
    return values[..., 0]


@lru_cache(maxsize=8)
def _tables(seed: int, device: torch.device) -> _Tables:
    return _Tables(
        signs=_signs(f"signs {seed}", 2 * WIDTH).to(device),
        weights=_odd(f"weights {seed}", 2 * WIDTH).to(device),
        mixing=_signs(f"mixing {seed}", OUTPUTS * PLACES).view(OUTPUTS, PLACES).to(device),
        folding=_odd(f"folding {seed}", 2 * WIDTH).view(2, WIDTH).to(device))


@lru_cache(maxsize=8)
def _offsets(seed: int, rows: int) -> list[int]:
    return [int(number) % WIDTH for number in np.frombuffer(_random(f"offsets {seed}", 4 * rows), "<u4")]


def _signs(name: str, count: int) -> Tensor:
    bits = np.unpackbits(np.frombuffer(_random(name, count // 8), np.uint8))
    return torch.from_numpy(bits.astype(np.float32)).mul_(2).sub_(1)


def _odd(name: str, count: int) -> Tensor:
    return torch.from_numpy(np.frombuffer(_random(name, 4 * count), "<i4") | 1)


def _random(name: str, size: int) -> bytes:
    return shake_256(f"covey sketch {name}".encode()).digest(size)
