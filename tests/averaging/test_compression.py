"""Codecs against closed forms and other implementations; what is malformed never becomes a value."""

import struct
from typing import get_args

import numpy as np
import pytest
import torch
from hivemind.compression import Float16Compression, Uniform8BitQuantization
from hivemind.compression.base import CompressionInfo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from averaging import compression
from averaging.compression import BLOCK, CODECS, check_codec, decode, encode, encoded_size, error_bound, roundtrip
from averaging.config import Averaging
from training.errors import BadInput

LOSSY = CODECS[1:]
FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def drawn(seed: int, count: int, scale: int, offset: float) -> Tensor:
    """Normal values around `offset`, from subnormal to near the largest float32."""
    values = np.random.default_rng(seed).normal(size=count) * 10.0**scale + offset
    return torch.from_numpy(values.clip(-3e38, 3e38).astype(np.float32))


def neighbours(seed: int, reach: int, start: float) -> Tensor:
    """Values at most `reach` float32 steps above `start`, where float32 rounds as coarsely as an 8-bit code does."""
    steps = np.random.default_rng(seed).integers(0, reach, 64, dtype=np.int32)
    return torch.from_numpy((np.float32(start).view(np.int32) + steps).view(np.float32))


VECTORS = st.one_of(
    st.lists(FLOAT32, min_size=1, max_size=40).map(lambda values: torch.tensor(values, dtype=torch.float32)),
    st.builds(neighbours, st.integers(0, 2**32), st.integers(2, 1200), st.sampled_from([0.0, 1.0, -1.0, 0.99999, 3.7])),
    st.builds(drawn, st.integers(0, 2**32), st.sampled_from([1, 2, 255, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 1]),
              st.integers(-44, 37), st.sampled_from([0.0, 1.0, -1e5])))


def arrived(name: str, values: Tensor) -> Tensor:
    return decode(name, encode(name, values), values.numel())


def closed_form(name: str, values: Tensor) -> np.ndarray:
    """The table of averaging/compression.py, written out for one vector: the largest error of each value."""
    limit = {"none": np.inf, "fp16": 65504, "bf16": 3.3895313892515355e38}.get(name, 2.0**126)
    exact = values.numpy().astype(np.float64)
    x = exact.clip(-limit, limit)
    size = np.abs(x)
    float32_rounds = 2.0**-24 * size.max() + 2.0**-149
    blocks = [np.full(len(block), np.abs(block).max()) for block in np.split(x, range(BLOCK, len(x), BLOCK))]
    bound: np.ndarray = {
        "none": np.zeros_like(x),
        "fp16": np.maximum(size * 2.0**-11, 2.0**-25),
        "bf16": np.maximum(size * 2.0**-8, 2.0**-126),
        "uniform8bit": np.full_like(x, (x.max() - x.min()) / 255 / 2 * 1.00025 + float32_rounds),
        "blockwise8bit": np.concatenate(blocks) / 127 / 2 * 1.00025 + 2.0**-149,
    }[name] + np.abs(exact - x)
    return bound


@pytest.mark.parametrize("name", CODECS)
@settings(deadline=None)
@given(values=VECTORS)
def test_every_error_is_within_the_closed_form(name: str, values: Tensor) -> None:
    error = (arrived(name, values).double() - values.double()).abs().numpy()
    assert (error <= closed_form(name, values)).all()
    stated = error_bound(name, values).numpy()
    assert (error <= stated).all()
    assert (stated <= closed_form(name, values) * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", CODECS)
@settings(deadline=None)
@given(values=VECTORS)
def test_what_went_through_a_codec_goes_through_unchanged(name: str, values: Tensor) -> None:
    data = encode(name, values)
    assert encode(name, decode(name, data, values.numel())) == data


@pytest.mark.parametrize("name", CODECS)
def test_sizes_are_exact(name: str) -> None:
    for count in (0, 1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3):
        blocks = (count + BLOCK - 1) // BLOCK
        expected = {"none": 4 * count, "fp16": 2 * count, "bf16": 2 * count, "uniform8bit": count + 8 * (count > 0),
                    "blockwise8bit": count + 4 * blocks}[name]
        assert encoded_size(name, count) == expected == len(encode(name, torch.randn(count)))
        assert arrived(name, torch.randn(count)).shape == (count,)


@pytest.mark.parametrize("name", CODECS)
def test_zeros_arrive_as_zeros_and_beside_a_large_value_too(name: str) -> None:
    assert torch.equal(arrived(name, torch.zeros(BLOCK + 1)), torch.zeros(BLOCK + 1))
    if name != "uniform8bit":  # whose zero lies between two codes
        values = torch.zeros(BLOCK + 1)
        values[3] = 1000.0
        assert torch.equal(arrived(name, values), values)


@pytest.mark.parametrize("name", ["none", "uniform8bit", "blockwise8bit"])
@pytest.mark.parametrize("value", [3.3, -1e-3, 1e-42, 2.0**126])
def test_constants_arrive_exactly(name: str, value: float) -> None:
    for count in (1, 5, BLOCK + 1):
        assert torch.equal(arrived(name, torch.full((count,), value)), torch.full((count,), value))


@pytest.mark.parametrize(("name", "limit"), [("fp16", 65504.0), ("bf16", torch.finfo(torch.bfloat16).max),
                                             ("uniform8bit", 2.0**126), ("blockwise8bit", 2.0**126)])
def test_what_is_too_large_for_a_codec_arrives_as_its_limit(name: str, limit: float) -> None:
    largest = torch.finfo(torch.float32).max
    assert arrived(name, torch.tensor([largest, -largest])).tolist() == [limit, -limit]
    assert arrived(name, torch.tensor([largest])).tolist() == [limit]
    assert arrived("fp16", torch.tensor([65519.0, 65520.0, -70000.0])).tolist() == [65504.0, 65504.0, -65504.0]


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_never_sent(name: str, value: float) -> None:
    for place in (0, 17, 5000):
        values = torch.randn(5001)
        values[place] = value
        with pytest.raises(ValueError, match="not finite"):
            encode(name, values)


@pytest.mark.parametrize("name", CODECS)
def test_wrong_lengths_are_refused(name: str) -> None:
    data = encode(name, torch.randn(BLOCK + 5))
    for wrong in (b"", data[:-1], data + b"\0", data[:3]):
        with pytest.raises(ValueError, match="bytes for"):
            decode(name, wrong, BLOCK + 5)
    with pytest.raises(ValueError, match="bytes for"):
        decode(name, b"\0", 0)


@pytest.mark.parametrize(("name", "data"), [
    ("none", struct.pack("<3f", 1, float("nan"), 2)), ("none", struct.pack("<3f", 1, 2, float("-inf"))),
    ("fp16", struct.pack("<3e", 1, float("nan"), 2)), ("fp16", struct.pack("<3e", 1, float("inf"), 2)),
    ("bf16", struct.pack("<3H", 0x3F80, 0x7FC0, 0)), ("bf16", struct.pack("<3H", 0x3F80, 0xFF80, 0)),
    ("uniform8bit", struct.pack("<2f", 0, float("inf")) + b"\0\0\0"),
    ("uniform8bit", struct.pack("<2f", float("nan"), 1) + b"\0\0\0"),
    ("uniform8bit", struct.pack("<2f", 1, 0) + b"\0\1\2"),
    ("uniform8bit", struct.pack("<2f", -3e38, 3e38) + b"\0\1\2"),
    ("blockwise8bit", struct.pack("<f", float("nan")) + b"\0\0\0"),
    ("blockwise8bit", struct.pack("<f", float("inf")) + b"\0\0\0"),
    ("blockwise8bit", struct.pack("<f", -1) + b"\0\1\2"), ("blockwise8bit", struct.pack("<f", 3e38) + b"\0\1\2"),
])
def test_values_and_scales_that_are_not_finite_are_refused(name: str, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"finite|range"):
        decode(name, data, 3)


@pytest.mark.parametrize("name", CODECS)
@settings(deadline=None)
@given(data=st.data(), numel=st.integers(1, 20))
def test_whatever_bytes_come_no_value_is_infinite(name: str, data: st.DataObject, numel: int) -> None:
    size = encoded_size(name, numel)
    sent = data.draw(st.binary(min_size=size, max_size=size))
    try:
        values = decode(name, sent, numel)
    except ValueError:
        return
    assert values.shape == (numel,)
    assert values.isfinite().all()


def test_huge_values_whose_sum_overflows_are_not_taken_for_infinite() -> None:
    values = torch.full((10,), 3e38)
    assert torch.equal(arrived("none", values), values)


@pytest.mark.parametrize("name", CODECS)
def test_any_buffer_is_decoded_into_memory_of_its_own(name: str) -> None:
    values = torch.randn(BLOCK + 5)
    data = bytearray(encode(name, values))
    first, second = decode(name, data, len(values)), decode(name, memoryview(bytes(data)), len(values))
    data[:] = bytes(len(data))
    assert torch.equal(first, second)
    first.add_(1)


def test_fp16_and_bf16_round_as_numpy_and_as_integers_do() -> None:
    values = torch.cat([drawn(0, 5000, scale, 0.0) for scale in range(-7, 5)]).clamp(-65504, 65504)
    assert encode("fp16", values) == values.numpy().astype(np.float16).tobytes()
    bits = values.numpy().view(np.uint32).astype(np.uint64)
    nearest_even = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    assert encode("bf16", values) == nearest_even.astype(np.uint16).tobytes()


def test_uniform8bit_is_the_affine_quantiser() -> None:
    values = drawn(1, 5000, 0, 0.5)
    low, high, *codes = struct.unpack("<ff5000B", encode("uniform8bit", values))
    assert (low, high) == (values.min(), values.max())
    exact = (values.numpy().astype(np.float64) - low) / (high - low) * 255
    assert np.abs(np.array(codes) - exact).max() <= 0.5 + 1e-4
    expected = low + np.array(codes) * ((high - low) / 255)
    np.testing.assert_allclose(arrived("uniform8bit", values).numpy(), expected, rtol=1e-6, atol=1e-7)


def test_blockwise8bit_is_absmax_per_block() -> None:
    values = drawn(2, 2 * BLOCK + 10, 0, 0.0)
    values[BLOCK:] *= 1e-6  # blocks of small values keep their precision
    data = encode("blockwise8bit", values)
    scales, codes = np.frombuffer(data, "<f4", 3), np.frombuffer(data, np.int8, offset=12)
    for block, scale, code in zip(values.split(BLOCK), scales, np.split(codes, [BLOCK, 2 * BLOCK]), strict=True):
        assert scale == block.abs().max()
        assert np.abs(code - block.numpy().astype(np.float64) / scale * 127).max() <= 0.5 + 1e-4
        received = arrived("blockwise8bit", block).numpy()
        np.testing.assert_allclose(received, code.astype(np.float64) * scale / 127, rtol=1e-6)


def test_fp16_is_hiveminds() -> None:
    values = drawn(3, 10_000, 4, 0.0)  # some beyond 65504
    info = CompressionInfo.from_tensor(values)
    sent = Float16Compression().compress(values, info)
    assert sent.buffer == encode("fp16", values)
    assert torch.equal(Float16Compression().extract(sent), arrived("fp16", values))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_uniform8bit_errs_less_than_hiveminds_at_worst() -> None:
    values = drawn(4, 100_000, 0, 0.0)
    codes, codebook = Uniform8BitQuantization().quantize(values)  # its extract() fails on numpy 2.4
    theirs = (torch.from_numpy(codebook[codes]) - values).abs().max()
    assert (arrived("uniform8bit", values) - values).abs().max() < theirs / 4  # it cuts off at three sigma


@pytest.mark.parametrize("name", CODECS)
def test_a_roundtrip_is_what_arrives_in_pieces(name: str) -> None:
    values = torch.randn(3 * BLOCK + 100)
    expected = torch.cat([arrived(name, piece) for piece in values.split(BLOCK)])
    assert torch.equal(roundtrip(name, values, BLOCK), expected)
    assert roundtrip(name, torch.zeros(0), BLOCK).shape == (0,)


def test_blockwise8bit_does_not_depend_on_where_it_is_cut() -> None:
    values = torch.randn(5 * BLOCK + 100)
    whole = arrived("blockwise8bit", values)
    assert all(torch.equal(roundtrip("blockwise8bit", values, blocks * BLOCK), whole) for blocks in (1, 2, 3, 9))


@pytest.mark.parametrize("name", CODECS)
def test_every_codec_works_here(name: str) -> None:
    check_codec(name)


@pytest.mark.parametrize(("table", "name", "broken"), [
    ("_DECODERS", "fp16", lambda data: torch.zeros(len(data) // 2)),
    ("_DECODERS", "uniform8bit", lambda data: np.frombuffer(data, np.uint8, offset=8) + "no number"),
    ("_ENCODERS", "bf16", lambda values, low, high: b"short")])
def test_a_codec_that_does_not_work_is_an_error_at_start(monkeypatch: pytest.MonkeyPatch, table: str, name: str,
                                                         broken: object) -> None:
    monkeypatch.setitem(getattr(compression, table), name, broken)
    with pytest.raises(BadInput, match=f"compression {name} does not work on this machine"):
        check_codec(name)


@pytest.mark.parametrize("option", ["compression", "state_compression"])
def test_recipes_know_these_codecs_and_no_others(option: str) -> None:
    assert get_args(Averaging.model_fields[option].annotation) == CODECS
