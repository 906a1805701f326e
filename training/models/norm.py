"""Normalisation layers by their names in `model.trunk.norm`."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import nn

GROUPS = 32  # Wu and He, arXiv 1803.08494, section 4.1


def norm_layer(name: Literal["batch", "group", "layer"]) -> Callable[[int], nn.Module]:
    """What makes a layer for so many channels; each layer starts as the identity after normalising."""
    layers: dict[str, Callable[[int], nn.Module]] = {
        "batch": nn.BatchNorm2d, "group": _group_norm, "layer": partial(nn.GroupNorm, 1)}
    return layers[name]


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(GROUPS, channels), channels)
