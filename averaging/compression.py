"""How values travel: five encodings of float32 vectors, each with an exact size and a bound on its error.

| name | bytes for n values | largest error of a value x |
|---|---|---|
| none | 4n | 0 |
| fp16 | 2n | 2^-11 of it, and 2^-25 below 2^-14 |
| bf16 | 2n | 2^-8 of it, and 2^-126 below that (some processors take such values for 0) |
| uniform8bit | 8 + n | (max - min) / 255 / 2 |
| blockwise8bit | 4 ceil(n / 4096) + n | (largest magnitude among the 4096 values of its block) / 127 / 2 |

The 8-bit bounds come with what float32 itself rounds (`error_bound` has it all). Magnitudes above a codec's limit
(`LIMITS`: 65504 of fp16, 2^126 of the 8-bit ones) arrive as the limit, so that no finite value becomes infinite.
What has gone through a codec goes through it again unchanged: `encode(decode(encode(x))) == encode(x)`, to the byte.
Of blockwise8bit that also holds if the vector is cut elsewhere, at multiples of 4096 values.

Bytes are little-endian. uniform8bit: min, max (float32), then a byte per value, 0 for min to 255 for max.
blockwise8bit: each block's largest magnitude (float32), then a signed byte per value, 127 for it.
"""

import struct
from collections.abc import Callable, Mapping
from math import ceil, inf, isfinite

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from training.errors import BadInput

BLOCK = 4096  # values that share a scale in blockwise8bit
LIMITS: Mapping[str, float] = {
    "none": inf, "fp16": torch.finfo(torch.float16).max, "bf16": torch.finfo(torch.bfloat16).max,
    "uniform8bit": 2.0**126, "blockwise8bit": 2.0**126,  # so that max - min and scale x 127 stay finite
}
CODECS = tuple(LIMITS)


def encode(name: str, values: Tensor) -> bytes:
    """`values` (float32, [n], CPU, contiguous) as codec `name` sends them. ValueError if one is not finite."""
    if not values.numel():
        return b""
    low, high = (float(bound) for bound in torch.aminmax(values))  # either is NaN if any value is
    if not (isfinite(low) and isfinite(high)):
        raise ValueError("a value to send is not finite")
    limit = LIMITS[name]
    if max(-low, high) > limit:
        values = values.clamp(-limit, limit)
        low, high = (min(max(bound, -limit), limit) for bound in (low, high))
    return _ENCODERS[name](values, low, high)


def decode(name: str, data: bytes | bytearray | memoryview, numel: int) -> Tensor:
    """The `numel` values in `data`: float32, [numel], all finite, in memory of their own.

    ValueError if `data` has another length than `encoded_size`, or holds a value or a scale that is not finite or
    that `encode` never writes.
    """
    expected = encoded_size(name, numel)
    if len(data) != expected:
        raise ValueError(f"{len(data)} bytes for {numel} values as {name}, not {expected}")
    values = _DECODERS[name](data) if numel else torch.empty(0)
    # the sum is fast, and not finite if a value isn't; of huge values it may overflow
    if not torch.isfinite(values.sum()) and not torch.isfinite(values).all():
        raise ValueError(f"a value that is not finite, as {name}")
    return values


def encoded_size(name: str, numel: int) -> int:
    """Bytes that `numel` values take."""
    return _SIZES[name](numel) if numel else 0


def roundtrip(name: str, values: Tensor, chunk: int) -> Tensor:
    """What arrives where `values` (float32, [n]) are sent in pieces of `chunk` values: float32, [n]."""
    return torch.cat([decode(name, encode(name, piece), piece.numel()) for piece in torch.split(values, chunk)])


def error_bound(name: str, values: Tensor) -> Tensor:
    """How far each of `values` (float32, [n]) may be from what arrives, if they are sent in one piece: float64, [n]."""
    exact = values.double().clamp(-LIMITS[name], LIMITS[name])
    return _BOUNDS[name](exact) + (values.double() - exact).abs() if values.numel() else exact


def check_codec(name: str) -> None:
    """Send a sample through codec `name` on this machine, as every peer does at its start. BadInput if it fails."""
    sample = torch.linspace(-3.0, 5.0, 2 * BLOCK + 1)
    try:
        data = encode(name, sample)
        difference = (decode(name, data, sample.numel()).double() - sample.double()).abs()
        fault = "" if bool((difference <= error_bound(name, sample)).all()) else f"errors up to {difference.max():g}"
    except (RuntimeError, TypeError, ValueError) as error:
        fault = str(error)
    if fault:
        raise BadInput(f"compression {name} does not work on this machine ({fault})",
                       expected="values that arrive within the codec's error bound",
                       mend="Choose another averaging.compression, or install the versions that setup.cfg names")


def _encode_uniform(values: Tensor, low: float, high: float) -> bytes:
    low, high = low + 0.0, high + 0.0  # -0.0 becomes 0.0: which of them is the minimum is anybody's guess
    if low == high:
        codes = torch.zeros(values.numel(), dtype=torch.uint8)
    else:  # dividing first: 255 / (high - low) may overflow
        codes = values.sub(low).div_(high - low).mul_(255).round_().to(torch.uint8)
    return b"".join((struct.pack("<ff", low, high), codes.numpy().data))


def _decode_uniform(data: bytes | bytearray | memoryview) -> Tensor:
    low, high = struct.unpack_from("<ff", data)
    limit = LIMITS["uniform8bit"]
    if not -limit <= low <= high <= limit:
        raise ValueError(f"from {low} to {high} is no range of uniform8bit")
    # a table in float64, and both ends exact, so that values come back as the codes that they came from
    table = (low + np.arange(256) * ((high - low) / 255)).astype(np.float32)
    table[255] = high
    return torch.from_numpy(np.take(table, np.frombuffer(data, np.uint8, offset=8)))


def _encode_blockwise(values: Tensor, low: float, high: float) -> bytes:
    blocks = functional.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    scales = torch.maximum(blocks.amax(1), -blocks.amin(1)).abs_()  # abs: no -0.0
    divisors = torch.where(scales > 0, scales, 1.0)
    codes = (blocks / divisors[:, None]).mul_(127).round_().to(torch.int8).view(-1)[:values.numel()]
    return b"".join((scales.numpy().data, codes.numpy().data))


def _decode_blockwise(data: bytes | bytearray | memoryview) -> Tensor:
    count = ceil(len(data) / (BLOCK + 4))
    scales = torch.from_numpy(np.frombuffer(data, np.float32, count).copy())
    if not ((scales >= 0) & (scales <= LIMITS["blockwise8bit"])).all():
        raise ValueError("a block's scale is negative, too large or not finite")
    codes = np.frombuffer(data, np.int8, offset=4 * count)
    shares = torch.from_numpy(codes.astype(np.float32)).div_(127)  # 127 / 127 is 1: the largest comes back exactly
    whole = len(codes) // BLOCK * BLOCK
    shares[:whole].view(-1, BLOCK).mul_(scales[:whole // BLOCK, None])
    shares[whole:].mul_(scales[-1])
    return shares


def _copied(data: bytes | bytearray | memoryview, dtype: type[np.number]) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype).copy())


_ENCODERS: Mapping[str, Callable[[Tensor, float, float], bytes]] = {
    "none": lambda values, low, high: values.numpy().tobytes(),
    "fp16": lambda values, low, high: values.to(torch.float16).numpy().tobytes(),
    "bf16": lambda values, low, high: values.to(torch.bfloat16).view(torch.int16).numpy().tobytes(),
    "uniform8bit": _encode_uniform,
    "blockwise8bit": _encode_blockwise,
}
_DECODERS: Mapping[str, Callable[[bytes | bytearray | memoryview], Tensor]] = {
    "none": lambda data: _copied(data, np.float32),
    "fp16": lambda data: _copied(data, np.float16).float(),
    "bf16": lambda data: _copied(data, np.int16).view(torch.bfloat16).float(),
    "uniform8bit": _decode_uniform,
    "blockwise8bit": _decode_blockwise,
}
_SIZES: Mapping[str, Callable[[int], int]] = {
    "none": lambda numel: 4 * numel,
    "fp16": lambda numel: 2 * numel,
    "bf16": lambda numel: 2 * numel,
    "uniform8bit": lambda numel: 8 + numel,
    "blockwise8bit": lambda numel: 4 * ceil(numel / BLOCK) + numel,
}
_ROUNDED = 1 + 2.0**-12  # of an 8-bit step: what float32 rounds in working it out
_BOUNDS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": torch.zeros_like,
    "fp16": lambda values: (values.abs() * 2.0**-11).clamp(min=2.0**-25),
    "bf16": lambda values: (values.abs() * 2.0**-8).clamp(min=2.0**-126),
    "uniform8bit": lambda values: torch.full_like(values, float(
        (values.max() - values.min()) / 255 / 2 * _ROUNDED + values.abs().max() * 2.0**-24 + 2.0**-149)),
    "blockwise8bit": lambda values: torch.cat([
        torch.full_like(block, float(block.abs().max() / 127 / 2 * _ROUNDED + 2.0**-149))
        for block in torch.split(values, BLOCK)]),
}
