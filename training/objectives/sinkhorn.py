"""Sinkhorn-Knopp: assignments that use all prototypes, over the images of one process or of a group of them."""

import math
from typing import Any

import torch
from torch import Tensor, distributed


@torch.no_grad()
def sinkhorn(scores: Tensor, *, epsilon: float, num_iters: int, dtype: torch.dtype = torch.float32,
             power_law_exponent: float = 0.0, group: distributed.ProcessGroup | None = None) -> Tensor:
    """Scores [..., B, K] -> assignments [..., B, K] in `dtype`; each matrix by itself.

    An image's assignment sums to 1; a prototype's share comes near B / K as `num_iters` grows, or, with an exponent
    p, near a share proportional to 1 / (i + 1)^p for prototype i. With a `group`, the matrices of its processes, each
    of B images, count as one of N B.
    Sinkhorn-Knopp (Cuturi, arXiv 1306.0895; SwAV, equations 3 to 5), in `dtype` under autocast too: exp(1 / 0.05)
    is beyond float16.
    """
    scores = scores.to(dtype) / epsilon
    # The largest finite entry becomes 1, and an infinite one no more than that.
    peak = scores.masked_fill(scores == math.inf, -math.inf).amax((-2, -1), keepdim=True)
    plan = scores.sub_(_all_reduce(peak, group, distributed.ReduceOp.MAX)).exp_().clamp_(max=1)
    plan /= _all_reduce(plan.sum((-2, -1), keepdim=True), group)
    images = plan.shape[-2] * (distributed.get_world_size(group) if group else 1)
    shares = _shares(plan, power_law_exponent)
    for _ in range(num_iters):
        mass = _all_reduce(plan.sum(-2, keepdim=True), group)
        lift = 1e-12 * (mass == 0).any(-1, keepdim=True)  # for a prototype that has underflowed everywhere
        plan.add_(lift).mul_(shares / (mass + images * lift))
        plan /= plan.sum(-1, keepdim=True) * images
    return plan.mul_(images)


def _shares(plan: Tensor, exponent: float) -> Tensor:
    """The share of all images that each prototype is to get, [K]."""
    weights = torch.arange(1, plan.shape[-1] + 1, dtype=plan.dtype, device=plan.device) ** -exponent
    return weights / weights.sum()


def _all_reduce(tensor: Tensor, group: distributed.ProcessGroup | None,
                operation: Any = distributed.ReduceOp.SUM) -> Tensor:
    """`tensor` combined over the processes of `group`, in place."""
    if group is not None:
        distributed.all_reduce(tensor, operation, group=group)
    return tensor
