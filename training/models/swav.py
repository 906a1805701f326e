"""SwAV's head: a projection onto the unit sphere, and prototypes that score it (arXiv 2006.09882)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


class SwavHead(nn.Module):
    """Features [N, dims[0]] -> embedding [N, dims[-1]] of length 1, and scores [N, K] of each prototype head.

    Where prototypes have length 1, a score is the cosine between embedding and prototype. From the embedding on, in
    float32 under autocast too: bfloat16 knows cosines to 1/256, which the temperature makes a twentieth of a nat.
    """

    def __init__(self, dims: Sequence[int], *, use_bn: bool, num_clusters: Sequence[int]) -> None:
        super().__init__()
        self.projection = _projection(dims, use_bn)
        self.prototypes = nn.ModuleList(nn.Linear(dims[-1], k, bias=False) for k in num_clusters)

    def forward(self, features: Tensor) -> tuple[Tensor, list[Tensor]]:
        projected = self.projection(features)
        with torch.autocast(features.device.type, enabled=False):
            wide = projected.to(torch.promote_types(projected.dtype, torch.float32))
            embedding = functional.normalize(wide, dim=1)
            return embedding, [prototypes(embedding) for prototypes in self.prototypes]

    @torch.no_grad()
    def normalise_prototypes(self) -> None:
        """Brings every prototype to length 1, in place."""
        for weight in self.prototypes.parameters():
            weight.copy_(functional.normalize(weight, dim=1))


def _projection(dims: Sequence[int], use_bn: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(dims[:-1]):
        norm = [nn.BatchNorm1d(outputs)] if use_bn else []
        layers += [nn.Linear(inputs, outputs), *norm, nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(dims[-2], dims[-1]))
