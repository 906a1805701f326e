"""What every objective is, and how one is built from its name."""

from abc import ABC, abstractmethod
from importlib import import_module

import torch
from torch import Tensor, nn

from training.recipe import Training


class Objective(nn.Module, ABC):
    """A model, the loss that trains it, and what has to happen around an update of its parameters."""

    backbone: nn.Module
    """Images float [B, 3, H, W] -> features float [B, F]: what is evaluated and exported."""

    @abstractmethod
    def forward(self, views: list[Tensor], epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss over the batch, a scalar with gradient, and metrics, scalars without.

        `views`: one float tensor [num_crops[i] * B, 3, size_i, size_i] per size of crop, crop-major.
        `epoch`: collaborative epochs, that is updates, so far.
        """

    def before_update(self, epoch: int) -> None:
        """Called when gradients are complete, before the optimiser uses them in the update of `epoch`."""

    def after_update(self) -> None:
        """Called when the optimiser has changed the parameters."""


def build_objective(training: Training) -> Objective:
    """The objective that `training` names, on the CPU; its seed gives every peer the same parameters.

    The objective `name` is what `build` in training/objectives/name.py returns.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        objective: Objective = import_module(f"training.objectives.{training.objective}").build(training)
    return objective
