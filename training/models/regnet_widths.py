"""How wide and deep the stages of a RegNet are, from its parameters (Radosavovic et al., arXiv 2003.13678).

Imports no torch.
"""

import math
from collections import Counter
from typing import NamedTuple


class Parameters(NamedTuple):
    """What names a RegNet: blocks, first width, slope of widths, step between stages' widths, width of a group."""

    depth: int
    w_0: int
    w_a: float
    w_m: float
    group_width: int


class Stage(NamedTuple):
    """`blocks` blocks of `width` channels, convolved in groups of `group_width`, which divides `width`."""

    blocks: int
    width: int
    group_width: int


# Those with squeeze-and-excitation: torchvision's, and SEER's of 256 GF (Goyal et al., arXiv 2103.01988).
PRESETS = {
    "regnet_y_400mf": Parameters(16, 48, 27.89, 2.09, 8),
    "regnet_y_800mf": Parameters(14, 56, 38.84, 2.4, 16),
    "regnet_y_1_6gf": Parameters(27, 48, 20.71, 2.65, 24),
    "regnet_y_3_2gf": Parameters(21, 80, 42.63, 2.66, 24),
    "regnet_y_8gf": Parameters(17, 192, 76.82, 2.19, 56),
    "regnet_y_16gf": Parameters(18, 200, 106.23, 2.48, 112),
    "regnet_y_32gf": Parameters(20, 232, 115.89, 2.53, 232),
    "regnet_y_128gf": Parameters(27, 456, 160.83, 2.52, 264),
    "regnet_y_256gf": Parameters(27, 640, 230.83, 2.53, 373),
}


def stages(parameters: Parameters) -> list[Stage]:
    """The stages, narrowest first. Blocks whose widths round to the same are one stage."""
    widths = Counter(_block_width(block, parameters) for block in range(parameters.depth))
    return [_whole_groups(blocks, width, parameters.group_width) for width, blocks in widths.items()]


def _block_width(block: int, parameters: Parameters) -> int:
    """Equations 2 to 4: a line, rounded to the nearest w_0 w_m^k, k whole, and that to a multiple of 8."""
    line = parameters.w_0 + parameters.w_a * block
    step = round(math.log(line / parameters.w_0) / math.log(parameters.w_m))
    return 8 * round(parameters.w_0 * parameters.w_m**step / 8)


def _whole_groups(blocks: int, width: int, group_width: int) -> Stage:
    """Brings `width` to the nearest multiple of the group's width, but not below 0.9 of what it was.

    So the 10368 channels that the line gives the last stage of regnet_y_256gf become 28 groups of 373: 10444.
    """
    group_width = min(group_width, width)
    whole = int(width / group_width + 0.5) * group_width
    return Stage(blocks, whole if whole >= 0.9 * width else whole + group_width, group_width)
