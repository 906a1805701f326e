"""Centered clipping against numpy, the plain mean, and bounds on what one bad contribution can do."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from averaging.robust import ITERATIONS, centered_clip


def drawn(seed: int, members: int, size: int) -> tuple[Tensor, Tensor]:
    """Contributions around a common direction, and weights from 1 to 100."""
    generator = torch.Generator().manual_seed(seed)
    stack = torch.randn(size, generator=generator) + 0.5 * torch.randn(members, size, generator=generator)
    return stack, torch.randint(1, 100, (members,), generator=generator).float()


DRAWN = st.builds(drawn, st.integers(0, 2**32), st.integers(1, 9), st.sampled_from([1, 2, 50]))


def weighted_mean(stack: Tensor, weights: Tensor) -> Tensor:
    return (weights.double()[:, None] * stack.double()).sum(0) / weights.double().sum()


def in_numpy(stack: np.ndarray, weights: np.ndarray, clip_radius: float, iterations: int) -> np.ndarray:
    """Algorithm 2 of arXiv 2012.10333 (CC), with our start and radius, a member at a time."""
    centre = np.median(stack, axis=0)
    for _ in range(iterations):
        radius = clip_radius * np.median([np.linalg.norm(x - centre) for x in stack])
        step = np.zeros_like(centre)
        for x, weight in zip(stack, weights, strict=True):
            length = np.linalg.norm(x - centre)
            step += weight / weights.sum() * (x - centre) * (min(1, radius / length) if length > 0 else 1)
        centre = centre + step
    return centre


@settings(deadline=None)
@given(drawn=DRAWN, clip_radius=st.sampled_from([0.1, 0.5, 1.0, 3.0]), iterations=st.integers(0, 5),
       bad=st.sampled_from([1.0, -10.0, 1e6]))
def test_it_is_what_numpy_computes(drawn: tuple[Tensor, Tensor], clip_radius: float, iterations: int,
                                   bad: float) -> None:
    stack, weights = drawn
    stack[0] *= bad
    expected = in_numpy(stack.numpy().astype(np.float64), weights.numpy(), clip_radius, iterations)
    result = centered_clip(stack, weights, clip_radius, iterations)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-4, atol=1e-4 * (1 + np.abs(expected).max()))


@settings(deadline=None)
@given(drawn=DRAWN)
def test_nothing_clipped_is_the_weighted_mean(drawn: tuple[Tensor, Tensor]) -> None:
    stack, weights = drawn
    torch.testing.assert_close(centered_clip(stack, weights, 1e6).double(), weighted_mean(stack, weights),
                               rtol=1e-5, atol=1e-5)


def test_two_members_are_never_clipped_with_radius_1() -> None:
    stack, _ = drawn(5, 2, 100)
    torch.testing.assert_close(centered_clip(stack, torch.tensor([3.0, 3.0]), 1.0), stack.mean(0))


@pytest.mark.parametrize("members", [1, 2, 3, 8])
def test_equal_contributions_are_their_own_mean(members: int) -> None:
    x = torch.randn(100)
    result = centered_clip(x.repeat(members, 1), torch.rand(members) + 0.1, 1.0)
    torch.testing.assert_close(result, x, rtol=1e-6, atol=1e-6)
    assert centered_clip(torch.zeros(members, 7), torch.ones(members), 1.0).tolist() == [0.0] * 7


@settings(deadline=None)
@given(drawn=DRAWN, permuted=st.randoms(use_true_random=False))
def test_the_order_of_members_is_nothing(drawn: tuple[Tensor, Tensor], permuted: object) -> None:
    stack, weights = drawn
    order = list(range(len(stack)))
    permuted.shuffle(order)  # type: ignore[attr-defined]
    torch.testing.assert_close(centered_clip(stack[order], weights[order], 1.0), centered_clip(stack, weights, 1.0),
                               rtol=1e-4, atol=1e-5)


def test_weight_0_counts_for_nothing_not_even_in_the_medians() -> None:
    stack, weights = drawn(6, 5, 30)
    idle = torch.full((4, 30), 1e9)
    result = centered_clip(torch.cat([stack, idle]), torch.cat([weights, torch.zeros(4)]), 1.0)
    assert torch.equal(result, centered_clip(stack, weights, 1.0))


@pytest.mark.parametrize("scale", [-10.0, -1e4, 1e30])
@pytest.mark.parametrize("size", [10, 1000])
def test_one_of_eight_does_not_pull_the_mean_out_of_the_honest(scale: float, size: int) -> None:
    for seed in range(20):
        stack, _ = drawn(seed, 8, size)
        honest = stack[1:].mean(0)
        radius = (stack[1:] - honest).norm(dim=1).max()  # of a ball that holds all honest ones
        stack[0] *= scale
        pulled = (centered_clip(stack, torch.ones(8), 1.0) - honest).norm()
        assert pulled < 0.5 * radius
        assert pulled < 0.5 * (stack.mean(0) - honest).norm()  # what it does to the plain mean


def test_claimed_samples_move_it_no_further_than_their_share_of_the_radius() -> None:
    stack, _ = drawn(7, 8, 1000)
    weights = torch.ones(8)
    weights[0] = 7  # half of all
    stack[0] *= -10
    honest = stack[1:].mean(0)
    farthest = (stack[1:] - honest).norm(dim=1).max()
    # ITERATIONS steps of half a radius, which is at most the distance of the farthest honest one from the centre
    centre, most = torch.zeros(0), 0.0
    for iterations in range(ITERATIONS + 1):
        centre = centered_clip(stack, weights, 1.0, iterations)
        assert (centre - honest).norm() <= most + farthest
        most += 0.5 * float((stack[1:] - centre).norm(dim=1).max())
    assert (centre - honest).norm() < 0.5 * (weighted_mean(stack, weights) - honest).norm()


@pytest.mark.parametrize("clip_radius", [0.3, 1.0])
def test_once_clipped_it_is_nothing_how_far_off_a_contribution_is(clip_radius: float) -> None:
    stack, weights = drawn(9, 8, 100)
    direction = torch.randn(100)
    stack[3] = 1e4 * direction
    before = centered_clip(stack, weights, clip_radius)
    stack[3] = 1e8 * direction
    torch.testing.assert_close(centered_clip(stack, weights, clip_radius), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [float("inf"), 1.0]])
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights from 0 on"):
        centered_clip(torch.ones(2, 3), torch.tensor(weights), 1.0)


def test_what_is_handed_over_stays_as_it_is() -> None:
    stack, weights = drawn(8, 5, 10)
    kept, kept_weights = stack.clone(), weights.clone()
    centered_clip(stack, weights, 1.0)
    assert torch.equal(stack, kept)
    assert torch.equal(weights, kept_weights)
