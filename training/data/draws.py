"""Random numbers that depend on what they are for, and on nothing that ran before."""

from hashlib import sha256

import torch
from torch import Tensor

from training.data.transforms_config import Interval


def seeded(*purpose: object) -> torch.Generator:
    """A generator of its own for `purpose`: the same numbers on every machine, in every order of calls."""
    seed = int.from_bytes(sha256("/".join(map(str, purpose)).encode()).digest()[:7])
    return torch.Generator().manual_seed(seed)


def uniform(shape: tuple[int, ...], bounds: Interval, generator: torch.Generator) -> Tensor:
    """float32 of `shape`, each between the two bounds."""
    return torch.rand(shape, generator=generator) * (bounds[1] - bounds[0]) + bounds[0]


def chance(count: int, probability: float, generator: torch.Generator) -> Tensor:
    """bool [count], each true with `probability`."""
    return torch.rand(count, generator=generator) < probability
