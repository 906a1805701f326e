"""A module's parameters in groups that an optimiser treats alike."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from training.optimizers.config import Optimizer

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)  # the first: batch, synchronised batch, instance
BIASES = {"bias", "in_proj_bias", "bias_k", "bias_v"}  # the last three are nn.MultiheadAttention's


def parameter_groups(config: Optimizer, module: nn.Module) -> list[dict[str, Any]]:
    """Groups that partition `module.parameters()`, ready for `build_optimizer`, and for hivemind to pass on to it.

    Each has its own weight_decay (0 where regularize_bn or regularize_bias says so), and where LARC is on, `adapt`.
    What counts is the type of the module that owns a parameter. The order follows the module alone: all peers of an
    experiment have the same groups.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for param, of_norm, is_bias in _kinds(module):
        decayed = (config.regularize_bn or not of_norm) and (config.regularize_bias or not is_bias)
        decay = config.weight_decay if decayed else 0.0
        adapt = not (config.larc.exclude_bias_and_norm and (of_norm or is_bias))
        options = {"weight_decay": decay} | ({"adapt": adapt} if config.use_larc else {})
        groups.setdefault((decay, adapt), {"params": [], **options})["params"].append(param)
    return list(groups.values())


def _kinds(module: nn.Module) -> Iterator[tuple[nn.Parameter, bool, bool]]:
    """Every parameter once, with whether it is a norm layer's, and whether it is a bias."""
    seen = set()
    for owner in module.modules():
        for name, param in owner.named_parameters(recurse=False):
            if param not in seen:
                seen.add(param)
                yield param, isinstance(owner, NORMS), name in BIASES
