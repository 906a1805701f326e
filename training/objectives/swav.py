"""SwAV: each crop predicts the cluster assignments of the others (Caron et al., arXiv 2006.09882)."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from training.models.resnet import ResNet
from training.models.swav import SwavHead
from training.objectives.config import SwavLoss
from training.objectives.objective import Objective
from training.recipe import Training


def build(training: Training) -> "Swav":
    return Swav(training)


class Swav(Objective):
    """Trunk, head and loss. Its metric is `prototype_entropy`; several heads give the mean of theirs."""

    def __init__(self, training: Training) -> None:
        super().__init__()
        model = training.model
        self.backbone = ResNet(model.trunk)
        self.head = SwavHead(model.head_dims, use_bn=model.head.use_bn, num_clusters=model.head.num_clusters)
        self.config = training.loss
        self.num_crops = training.data.transforms.total_num_crops
        self.after_update()

    def forward(self, views: list[Tensor], epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        features = torch.cat([self.backbone(crops) for crops in views])
        _, heads = self.head(features)
        losses = [swapped_prediction_loss(scores.unflatten(0, (self.num_crops, -1)), self.config, epoch)
                  for scores in heads]
        entropies = [prototype_entropy(scores) for scores in heads]
        return torch.stack(losses).mean(), {"prototype_entropy": torch.stack(entropies).mean()}

    def before_update(self, epoch: int) -> None:
        if epoch < self.config.freeze_prototypes_iters:
            # None rather than zero: momentum and weight decay would move them all the same
            self.head.prototypes.zero_grad(set_to_none=True)

    def after_update(self) -> None:
        if self.config.normalize_last_layer:
            self.head.normalise_prototypes()


def swapped_prediction_loss(scores: Tensor, config: SwavLoss, epoch: int) -> Tensor:
    """Cross-entropy, in nats, of crops' predictions under the assignments of other crops (equations 1, 2).

    `scores` [V, B, K]: V crops of B images against K prototypes. Mean over images, over every pair of an assigned
    crop and another one. A scalar of `scores`' dtype, float32 at least.
    """
    num_crops, batch, _ = scores.shape
    assigned = list(config.crops_for_assign)
    codes = assignments(scores[assigned], config, epoch)
    log_predictions = functional.log_softmax(scores.to(codes.dtype) / config.temperature, dim=-1)
    # All pairs of crops at once, less each assigned crop with itself.
    likelihood = (codes.sum(0) * log_predictions.sum(0)).sum() - (codes * log_predictions[assigned]).sum()
    return -likelihood / (len(assigned) * (num_crops - 1) * batch)


@torch.no_grad()
def assignments(scores: Tensor, config: SwavLoss, epoch: int) -> Tensor:
    """Scores [C, B, K] -> assignments [C, B, K]: of each image a distribution over prototypes, crop by crop."""
    codes = sinkhorn(scores, epsilon=config.epsilon, num_iters=config.num_iters,
                     dtype=torch.float64 if config.use_double_precision else torch.float32)
    if epoch < config.temp_hard_assignment_iters:
        codes = functional.one_hot(codes.argmax(-1), codes.shape[-1])
    return codes.to(torch.promote_types(scores.dtype, torch.float32))


@torch.no_grad()
def sinkhorn(scores: Tensor, *, epsilon: float, num_iters: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scores [..., B, K] -> assignments [..., B, K] in `dtype`; each matrix by itself.

    An image's assignment sums to 1; a prototype's share comes near B / K as `num_iters` grows.
    Sinkhorn-Knopp (Cuturi, arXiv 1306.0895; SwAV, equations 3 to 5), in `dtype` under autocast too: exp(1 / 0.05)
    is beyond float16.
    """
    scores = scores.to(dtype) / epsilon
    # The largest finite entry becomes 1, and an infinite one no more than that.
    peak = scores.masked_fill(scores == math.inf, -math.inf).amax((-2, -1), keepdim=True)
    plan = (scores - peak).exp_().clamp_(max=1)
    plan /= plan.sum((-2, -1), keepdim=True)
    images, prototypes = plan.shape[-2:]
    for _ in range(num_iters):
        mass = plan.sum(-2, keepdim=True)
        lift = 1e-12 * (mass == 0).any(-1, keepdim=True)  # for a prototype that has underflowed everywhere
        plan.add_(lift).div_((mass + images * lift) * prototypes)
        plan /= plan.sum(-1, keepdim=True) * images
    return plan * images


@torch.no_grad()
def prototype_entropy(scores: Tensor) -> Tensor:
    """Entropy of how often each prototype is nearest, as a share of its maximum: 0 where embeddings collapse.

    `scores` [N, K]; the maximum is ln min(N, K). The assignments would not tell: Sinkhorn spreads anything evenly.
    """
    samples, prototypes = scores.shape
    nearest = scores.argmax(1)
    counts = nearest.new_zeros(prototypes).index_add_(0, nearest, torch.ones_like(nearest))
    entropy: Tensor = torch.special.entr(counts / samples).sum()
    return entropy / math.log(min(samples, prototypes))
