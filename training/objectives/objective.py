"""What every objective is, and how one is built from its name."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from importlib import import_module
from itertools import groupby
from logging import getLogger
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

from training.models.sync_bn import synchronise
from training.recipe import Training

log = getLogger(__name__)
NORMS_WITH_STATISTICS = (nn.modules.batchnorm._BatchNorm,)


class Objective(nn.Module, ABC):
    """A model, the loss that trains it, and what has to happen around an update of its parameters."""

    backbone: nn.Module
    """Images float [B, 3, H, W] -> features float [B, F]: what is evaluated and exported."""

    @abstractmethod
    def forward(self, views: list[Tensor], labels: Tensor | None, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss over the batch, a scalar with gradient, and metrics, scalars without.

        `views`: one float tensor [num_crops[i] * B, 3, size_i, size_i] per size of crop, crop-major.
        `labels`: int64 [B], or None where the data has no classes.
        `epoch`: collaborative epochs, that is updates, so far.
        """

    def before_update(self, epoch: int) -> None:
        """Called when gradients are complete, before the optimiser uses them in the update of `epoch`."""

    def after_update(self) -> None:
        """Called when the optimiser has changed the parameters."""

    def shared_buffers(self) -> Iterator[Tensor]:
        """What peers average besides parameters: the running statistics of BatchNorm, in a fixed order."""
        for module in self.modules():
            if isinstance(module, NORMS_WITH_STATISTICS):
                yield from (buffer for buffer in (module.running_mean, module.running_var) if buffer is not None)

    def local_state(self) -> dict[str, Tensor]:
        """What this process alone needs to go on exactly as it would have; empty for most objectives."""
        return {}

    def load_local_state(self, state: dict[str, Tensor]) -> None:
        """Takes up a `local_state`; one that does not fit any more is left aside, with a line in the log."""

    def write_dump(self) -> Path | None:
        """Writes what led to the last loss, for whoever asks why it is not finite; where, if there is anything."""
        return None


def build_objective(training: Training, *, batch_size: int | None = None,
                    group: distributed.ProcessGroup | None = None, output_dir: Path | None = None) -> Objective:
    """The objective that `training` names, on the CPU; its seed gives every peer the same parameters.

    `batch_size`: images per process and micro-batch; None for evaluation and export, where nothing depends on it.
    `group`: this peer's own processes, where it has several. `output_dir`: where `write_dump` writes.
    The objective `name` is what `build` in training/objectives/name.py returns.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        module = import_module(f"training.objectives.{training.objective}")
        objective: Objective = module.build(training, batch_size=batch_size, group=group, output_dir=output_dir)
    if batch_size is not None:
        synchronise(objective, training.model.sync_bn, log=log.info)
    return objective


def full_precision(device: torch.device) -> torch.autocast:
    """Inside, autocast is off on `device`: for what half precision would spoil."""
    return torch.autocast(device.type, enabled=False)


def trunk_features(backbone: nn.Module, views: list[Tensor], num_crops: int, *, single_pass: bool) -> Tensor:
    """Features [num_crops * B, F] of all views, crop-major.

    Crops of one size share a pass of `backbone`, and so BatchNorm's statistics; with `single_pass`, VISSL's
    single_pass_every_crop, each crop has a pass of its own.
    """
    batch = sum(len(crops) for crops in views) // num_crops
    passes = [crop for crops in views for crop in torch.split(crops, batch)] if single_pass else [
        _joined(list(neighbours)) for _, neighbours in groupby(views, key=lambda crops: crops.shape[2:])]
    return _joined([backbone(crops) for crops in passes])


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]
