"""The sketch against its definition in numpy, and its distances against their closed-form mean and variance."""

from hashlib import shake_256
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from averaging.sketch import NBYTES, OUTPUTS, PLACES, WIDTH, distance, sketch

SEEDS = 100


def random_bytes(name: str, size: int) -> bytes:
    return shake_256(f"covey sketch {name}".encode()).digest(size)


def defined(values: np.ndarray, seed: int) -> bytes:
    """The definition in averaging/sketch.py, a table of every value's sign at a time; exact for small integers."""
    def signs(name: str, count: int) -> np.ndarray:
        bits = np.unpackbits(np.frombuffer(random_bytes(f"{name} {seed}", count // 8), np.uint8))
        return np.where(bits, 1, -1)

    def odd(name: str) -> np.ndarray:
        return (np.frombuffer(random_bytes(f"{name} {seed}", 8 * WIDTH), "<u4") | 1).astype(object)

    index = np.arange(len(values))
    offsets = np.frombuffer(random_bytes(f"offsets {seed}", 4 * (len(values) // WIDTH + 1)), "<u4") % WIDTH
    place, entry = index % WIDTH, index % WIDTH + offsets[index // WIDTH]
    mixing = signs("mixing", OUTPUTS * PLACES).reshape(OUTPUTS, PLACES)
    outputs = (mixing[:, place % PLACES] * signs("signs", 2 * WIDTH)[entry]) @ values.astype(np.float64)
    hashed = values.astype(np.float32).view(np.uint32).astype(object) * odd("weights")[entry]
    digest = [(hashed * odd("folding")[half * WIDTH + place]).sum() % 2**32 for half in (0, 1)]
    return outputs.astype("<f4").tobytes() + np.array(digest, "<u4").tobytes()


def integers(count: int, seed: int = 0) -> Tensor:
    """So small that sums of them are exact."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-20, 20, count).astype(np.float32))


def vector(values: Tensor) -> np.ndarray:
    return np.frombuffer(sketch([values]), np.float32, OUTPUTS)


@pytest.mark.parametrize(("count", "seed"), [(1, 0), (1000, 0), (WIDTH + 5, 0), (3 * WIDTH, 0), (2 * WIDTH + 77, 9)])
def test_it_is_what_its_definition_says(count: int, seed: int) -> None:
    values = integers(count)
    assert sketch([values], seed) == defined(values.numpy(), seed)


def test_numpy_rounds_it_alike() -> None:
    values = np.random.default_rng(4).normal(size=2 * WIDTH + 1000).astype(np.float32)
    bits = np.unpackbits(np.frombuffer(random_bytes("signs 0", WIDTH // 4), np.uint8))
    signs = np.where(bits, np.float32(1), np.float32(-1))
    sums = np.zeros(WIDTH, np.float32)
    for row, offset in enumerate(np.frombuffer(random_bytes("offsets 0", 12), "<u4") % WIDTH):
        piece = values[row * WIDTH:(row + 1) * WIDTH]
        sums[:len(piece)] += piece * signs[offset:offset + len(piece)]
    places = sums.reshape(-1, PLACES)
    while len(places) > 1:
        places = places[:len(places) // 2] + places[len(places) // 2:]
    bits = np.unpackbits(np.frombuffer(random_bytes("mixing 0", OUTPUTS * PLACES // 8), np.uint8))
    outputs = np.where(bits, np.float32(1), np.float32(-1)).reshape(OUTPUTS, PLACES) * places
    while outputs.shape[1] > 1:
        outputs = outputs[:, :outputs.shape[1] // 2] + outputs[:, outputs.shape[1] // 2:]
    assert sketch([torch.from_numpy(values)])[:4 * OUTPUTS] == outputs[:, 0].tobytes()


def test_it_has_136_bytes_whatever_it_is_of() -> None:
    assert len(sketch([])) == len(sketch([torch.zeros(0)])) == len(sketch([torch.randn(3, 5)])) == NBYTES == 136


def test_it_is_linear() -> None:
    x, y = integers(2 * WIDTH + 9, 1), integers(2 * WIDTH + 9, 2)
    assert np.array_equal(vector(x) - vector(y), vector(x - y))
    assert np.array_equal(vector(3 * x + y), 3 * vector(x) + vector(y))


def test_it_is_of_the_values_end_to_end_however_they_lie_in_memory() -> None:
    values = torch.randn(2 * WIDTH + 64)
    expected = sketch([values])
    assert sketch(values.split(1000)) == expected
    assert sketch([values[:64].view(2, 4, 2, 4).to(memory_format=torch.channels_last), values[64:]]) == expected
    assert sketch([values[:WIDTH], torch.zeros(0), values[WIDTH:].view(-1, 2).T.contiguous().T]) == expected
    unaligned = torch.empty(len(values) + 1)[1:]
    assert sketch([unaligned.copy_(values)]) == expected


def test_it_does_not_depend_on_the_number_of_threads() -> None:
    values, threads = torch.randn(WIDTH * 2), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = sketch([values])
        torch.set_num_threads(3)
        assert sketch([values]) == alone
    finally:
        torch.set_num_threads(threads)


def test_other_dtypes_count_as_float32() -> None:
    values = integers(100)
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int64):
        assert sketch([values.to(dtype)]) == sketch([values])


def test_parameters_that_require_gradients_are_taken() -> None:
    model = torch.nn.Linear(3, 4)
    assert sketch(model.parameters()) == sketch([parameter.detach() for parameter in model.parameters()])


@settings(deadline=None, max_examples=60)
@given(place=st.integers(0, WIDTH + 99), bit=st.integers(0, 31), scale=st.integers(-30, 3))
def test_any_bit_of_any_value_changes_it(place: int, bit: int, scale: int) -> None:
    values = torch.linspace(-1, 1, WIDTH + 100) * 10.0**scale
    changed = values.clone()
    changed.view(torch.int32)[place] ^= -2**31 if bit == 31 else 1 << bit
    assert sketch([changed]) != sketch([values])


def test_two_values_that_change_places_change_it() -> None:
    values = torch.randn(24)
    seen = {sketch([values])}
    for i, j in combinations(range(24), 2):
        swapped = values.clone()
        swapped[[i, j]] = values[[j, i]]
        seen.add(sketch([swapped]))
    assert len(seen) == 1 + 24 * 23 // 2


def difference(kind: str) -> Tensor:
    """A difference of parameters with a structure that random signs might meet badly."""
    values = {"normal": torch.randn(2 * WIDTH, generator=torch.Generator().manual_seed(1)),
              "constant": torch.full((2 * WIDTH,), 1e-3),
              "the same in every row": torch.randn(WIDTH, generator=torch.Generator().manual_seed(2)).repeat(2),
              "one value": torch.zeros(WIDTH), "two on one place": torch.zeros(2 * WIDTH),
              "a few large": torch.zeros(2 * WIDTH)}[kind]
    large = {"one value": [7], "two on one place": [5, 5 + WIDTH], "a few large": list(range(0, 2000, 100))}
    values[large.get(kind, [])] = 3.0
    return values


def variance_bound(values: Tensor) -> float:
    """Of the estimated square, relative to the square of the true one: 2/32 (1 + w) + w."""
    squares = values.double().square()
    of_places = squares.view(-1, PLACES)
    pairs = (of_places.sum(0).square() - of_places.square().sum(0)).sum()
    w = float(2 * pairs / squares.sum().square())
    return 2 / OUTPUTS * (1 + w) + w


@pytest.mark.parametrize("kind", ["normal", "constant", "the same in every row", "one value", "two on one place",
                                  "a few large"])
def test_the_estimated_square_has_the_true_one_as_mean_and_the_stated_variance(kind: str) -> None:
    values = difference(kind)
    true = float(values.double().square().sum())
    estimates = [distance(sketch([values], seed), bytes(NBYTES)) ** 2 / true for seed in range(SEEDS)]
    bound = variance_bound(values)
    assert abs(np.mean(estimates) - 1) < 4 * np.sqrt(bound / SEEDS) + 1e-6
    assert np.var(estimates) < 1.6 * bound


def test_distances_of_models_are_right_to_an_eighth() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(50_000, generator=generator)
    errors = []
    for spread in np.logspace(-4, 1, 120):
        y = x + float(spread) * torch.randn(50_000, generator=generator)
        errors.append(distance(sketch([x]), sketch([y])) / float((y - x).norm()) - 1)
    assert np.sqrt(np.mean(np.square(errors))) < 0.15  # 0.125 expected
    assert np.max(np.abs(errors)) < 0.5                # four standard deviations


def test_equal_parameters_have_no_distance_and_malformed_sketches_are_refused() -> None:
    values = torch.randn(1000)
    assert distance(sketch([values]), sketch([values.clone()])) == 0
    for wrong in (b"", bytes(NBYTES - 1), bytes(NBYTES + 1)):
        with pytest.raises(ValueError, match="not 136"):
            distance(wrong, sketch([values]))


def test_distances_of_what_is_not_finite_are_not_numbers() -> None:
    assert np.isnan(distance(sketch([torch.tensor([1.0, float("nan")])]), sketch([torch.ones(2)])))
