"""SwAV: each crop predicts the cluster assignments of the others (Caron et al., arXiv 2006.09882)."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.nn import functional

from training.errors import BadInput
from training.models.swav import SwavHead
from training.models.trunk import build_trunk
from training.objectives.checks import require_queue_within
from training.objectives.config import SwavLoss
from training.objectives.objective import Objective, full_precision, trunk_features
from training.objectives.queue import EmbeddingQueue, local_queue_length
from training.objectives.sinkhorn import sinkhorn
from training.recipe import SwavTraining, Training


def build(training: Training, *, batch_size: int | None, group: distributed.ProcessGroup | None,
          output_dir: Path | None) -> "Swav":
    """As `build_objective` says. Raises BadInput where head and trunk don't fit, or the queue exceeds the data."""
    assert isinstance(training, SwavTraining)
    require_queue_within(training, training.data.images_per_pass)
    processes = distributed.get_world_size(group) if group else 1
    length = local_queue_length(training.loss.queue, batch_size, processes) if batch_size else 0
    return Swav(training, queue_length=length, group=group, output_dir=output_dir)


class Swav(Objective):
    """Trunk, head, loss and queue. Its metric is `prototype_entropy`; several heads give the mean of theirs.

    Assignments and queue cover the processes of `group`, a volunteer's own, never the swarm.
    """

    def __init__(self, training: SwavTraining, *, queue_length: int = 0, group: distributed.ProcessGroup | None = None,
                 output_dir: Path | None = None) -> None:
        super().__init__()
        model, config = training.model, training.loss
        self.backbone = trunk = build_trunk(model.trunk)
        self.head = SwavHead(_dims(model.head.dims, trunk.feature_width), use_bn=model.head.use_bn,
                             num_clusters=model.head.num_clusters)
        self.queue = EmbeddingQueue(len(config.crops_for_assign), queue_length, model.head.dims[-1])
        self.config, self._group, self._output_dir = config, group, output_dir
        self._single_pass = model.single_pass_every_crop
        self.num_crops = training.data.transforms.total_num_crops
        self._last: dict[str, Tensor] = {}  # scores and assignments of every head, for `write_dump`
        self.after_update()

    def forward(self, views: list[Tensor], labels: Tensor | None, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        features = trunk_features(self.backbone, views, self.num_crops, single_pass=self._single_pass)
        embedding, heads = self.head(features)
        assigned = list(self.config.crops_for_assign)
        losses, self._last = [], {}
        with full_precision(embedding.device):
            for number, (prototypes, flat) in enumerate(zip(self.head.prototypes, heads, strict=True)):
                scores = flat.float().unflatten(0, (self.num_crops, -1))
                codes = assignments(_rows(scores, assigned), self.config, epoch, queued=self._queued(prototypes, epoch),
                                    group=self._group)
                losses.append(swapped_prediction_loss(scores, codes, self.config))
                self._last |= {f"head{number}.scores": scores.detach(), f"head{number}.assignments": codes}
            if epoch >= self.config.queue.start_iter:
                self.queue.push(_rows(embedding.detach().unflatten(0, (self.num_crops, -1)), assigned))
            entropies = [prototype_entropy(scores.detach()) for scores in heads]
        return torch.stack(losses).mean(), {"prototype_entropy": torch.stack(entropies).mean()}

    @torch.no_grad()
    def _queued(self, prototypes: nn.Module, epoch: int) -> Tensor | None:
        """Scores [C, L, K] of the queue with the prototypes as they are now, once it counts."""
        if epoch < self.config.queue.start_iter or not self.queue.full:
            return None
        scores: Tensor = prototypes(self.queue.embeddings)
        return scores

    def before_update(self, epoch: int) -> None:
        if epoch < self.config.freeze_prototypes_iters:
            # None rather than zero: momentum and weight decay would move them all the same
            self.head.prototypes.zero_grad(set_to_none=True)

    def after_update(self) -> None:
        if self.config.normalize_last_layer:
            self.head.normalise_prototypes()

    def local_state(self) -> dict[str, Tensor]:
        return self.queue.state() if self.queue.embeddings.numel() else {}

    def load_local_state(self, state: dict[str, Tensor]) -> None:
        if self.queue.embeddings.numel():
            self.queue.load(state)

    def write_dump(self) -> Path | None:
        """Scores [V, B, K] and assignments [C, B, K] of every head, as safetensors in `output_dir`."""
        if self._output_dir is None or not self._last:
            return None
        rank = distributed.get_rank(self._group) if self._group else 0
        path = self._output_dir / f"non-finite-loss-{rank}.safetensors"
        self._output_dir.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.cpu().contiguous() for name, tensor in self._last.items()}, path)
        return path


def _dims(dims: tuple[int, ...], width: int) -> tuple[int, ...]:
    """`dims` with the trunk's feature width filled in."""
    if dims[0] not in (0, width):
        raise BadInput(f"model.head.dims begins with {dims[0]}", expected=f"{width}, the trunk's feature width",
                       mend="Set it so, or to 0 for whatever the width is.")
    return (width, *dims[1:])


def _rows(tensor: Tensor, numbers: Sequence[int]) -> Tensor:
    """tensor[numbers], without the index that would be sent to a GPU, which stalls it."""
    return torch.stack([tensor[number] for number in numbers])


def swapped_prediction_loss(scores: Tensor, codes: Tensor, config: SwavLoss) -> Tensor:
    """Cross-entropy, in nats, of crops' predictions under the assignments of other crops (equations 1, 2).

    `scores` [V, B, K]: V crops of B images against K prototypes; `codes` [C, B, K]: assignments of the crops
    `config.crops_for_assign`. Mean over images, over every pair of an assigned crop and another one. A scalar of
    `codes`' dtype.
    """
    num_crops, batch, _ = scores.shape
    assigned = list(config.crops_for_assign)
    log_predictions = functional.log_softmax(scores.to(codes.dtype) / config.temperature, dim=-1)
    # All pairs of crops at once, less each assigned crop with itself.
    likelihood = (codes.sum(0) * log_predictions.sum(0)).sum() - (codes * _rows(log_predictions, assigned)).sum()
    return -likelihood / (len(assigned) * (num_crops - 1) * batch)


@torch.no_grad()
def assignments(scores: Tensor, config: SwavLoss, epoch: int, *, queued: Tensor | None = None,
                group: distributed.ProcessGroup | None = None) -> Tensor:
    """Scores [C, B, K] -> assignments [C, B, K]: of each image a distribution over prototypes, crop by crop.

    `queued` [C, L, K], scores of earlier images, and the images of all processes of `group` compete for the same
    prototypes. float32, or `scores`' dtype if that is wider.
    """
    images = scores.shape[1]
    together = scores if queued is None else torch.cat([scores, queued.to(scores.dtype)], dim=1)
    codes = sinkhorn(together, epsilon=config.epsilon, num_iters=config.num_iters, group=group,
                     dtype=torch.float64 if config.use_double_precision else torch.float32,
                     power_law_exponent=config.power_law_exponent)[:, :images]
    if epoch < config.temp_hard_assignment_iters:
        codes = functional.one_hot(codes.argmax(-1), codes.shape[-1])
    return codes.to(torch.promote_types(scores.dtype, torch.float32))


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
