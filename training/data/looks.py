"""What is drawn for the look of every crop, beside its place: mirrored, jittered, grey, blurred."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from training.data.draws import chance, uniform
from training.data.transforms_config import Transforms

JITTERS = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True)
class Looks:
    """One entry per crop in each of these. Lists, as decisions are read one by one."""

    flipped: list[bool]
    stages: list[list[int]]     # which jitter comes first, second, third, fourth; -1 where there is none
    amounts: list[list[float]]  # of each jitter: three factors, then a share of a turn
    gray: list[bool]
    sigma: list[float]          # deviation of the blur in pixels; 0 where there is none

    def of(self, rows: slice) -> "Looks":
        """Those of some crops."""
        return Looks(self.flipped[rows], [stage[rows] for stage in self.stages],
                     [amounts[rows] for amounts in self.amounts], self.gray[rows], self.sigma[rows])

    def jitters(self) -> Iterator[tuple[int, list[int], list[float]]]:
        """Jitter by jitter, in the order of time: which, for what crops, by how much."""
        for stage in self.stages:
            for jitter, amounts in enumerate(self.amounts):
                rows = [row for row, chosen in enumerate(stage) if chosen == jitter]
                yield jitter, rows, [amounts[row] for row in rows]


def draw_looks(transforms: Transforms, count: int, generator: torch.Generator) -> Looks:
    """For `count` crops, each by itself; the four jitters of each in an order of its own."""
    t, strength = transforms, transforms.color_jitter_strength
    around_one = (max(0.0, 1 - 0.8 * strength), 1 + 0.8 * strength)
    factors = uniform((3, count), around_one, generator)
    turns = uniform((1, count), (-0.2 * strength, 0.2 * strength), generator)
    jittered = chance(count, t.color_jitter_probability if strength else 0, generator)
    stages = torch.rand((len(JITTERS), count), generator=generator).argsort(dim=0).masked_fill(~jittered, -1)
    blurred = chance(count, t.blur_probability, generator)
    return Looks(
        flipped=chance(count, t.flip_probability, generator).tolist(),
        stages=stages.tolist() if jittered.any() else [],
        amounts=torch.cat([factors, turns]).tolist(),
        gray=chance(count, t.grayscale_probability, generator).tolist(),
        sigma=uniform((count,), t.blur_radius, generator).masked_fill(~blurred, 0).tolist())
