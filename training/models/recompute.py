"""Activation checkpointing (Chen et al., arXiv 1604.06174): time for memory, and nothing else changed."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class Recomputed(nn.Sequential):
    """A Sequential that keeps its blocks' inputs only; the rest is computed again in the backward pass.

    Blocks may draw no random numbers. Under torch.compile it runs as it is, uncompiled.
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False,
                           context_fn=partial(_contexts, block))
        return x


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the forward pass, and around the second one."""
    return nullcontext(), _running_statistics_kept(block)


@contextmanager
def _running_statistics_kept(block: nn.Module) -> Iterator[None]:
    """BatchNorm would count the same batch twice. Without momentum it does all that it did, but moves nothing."""
    layers = [(layer, layer.momentum, layer.num_batches_tracked) for layer in block.modules()
              if isinstance(layer, _BatchNorm) and layer.num_batches_tracked is not None]
    for layer, _, count in layers:
        layer.momentum, layer.num_batches_tracked = 0.0, count.clone()
    try:
        yield
    finally:
        for layer, momentum, count in layers:
            layer.momentum, layer.num_batches_tracked = momentum, count
