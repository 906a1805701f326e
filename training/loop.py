"""The training loop: images, views, loss, gradients, and a stepper that makes updates of them."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor

from training.data.batches import Batch
from training.objectives.objective import Objective
from training.precision import Precision


@dataclass(frozen=True)
class Progress:
    """Where the collaborative epoch stands after a micro-batch."""

    epoch: int                 # updates of the swarm so far
    samples_accumulated: int   # this process's own, towards the next update
    swarm_samples: int         # all peers', towards the next update
    swarm_peers: int
    updated: bool              # whether an update came of this micro-batch


@dataclass(frozen=True)
class StepReport:
    """One micro-batch, for whoever shows or records it."""

    epoch: int
    updated: bool              # whether an update came of it
    local_step: int            # micro-batches of this process so far
    samples_total: int         # samples of this process so far
    samples_accumulated: int
    swarm_samples: int
    swarm_peers: int
    samples_per_second: float  # of this process, over about the last ten steps, waiting included
    learning_rate: float       # of the last update
    loss: float
    metrics: dict[str, float]


class Stepper(Protocol):
    """Decides when gradients become an update, and together with whose."""

    @property
    def epoch(self) -> int:
        """Collaborative epochs, that is updates of the whole swarm, so far."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What makes the updates."""

    def step(self, samples: int) -> Progress:
        """Takes over the gradients of a micro-batch, means over its `samples`, and leaves none behind."""


class NonFiniteLoss(ArithmeticError):
    """The loss is infinite or not a number; nothing of its micro-batch has reached the stepper."""


def train(objective: Objective, batches: Iterable[Batch], views: Callable[[Batch], list[Tensor]], stepper: Stepper,
          precision: Precision, *, report: Callable[[StepReport], None], should_stop: Callable[[StepReport], bool],
          samples_before: int = 0) -> None:
    """Trains on `batches` until they end or `should_stop`. Raises NonFiniteLoss.

    `samples_before`: of this run before it was resumed. A micro-batch whose gradients overflow float16 is dropped.
    """
    device = next(objective.parameters()).device
    samples_total, recent_samples, recent_seconds = samples_before, 0.0, 0.0
    started = perf_counter()
    objective.train()
    for local_step, batch in enumerate(batches, start=1):
        labels = None if batch.labels is None else batch.labels.to(device, non_blocking=True)
        crops = views(batch)
        with precision.autocast():
            loss, metrics = objective(crops, labels, stepper.epoch)
        complete = precision.backward(loss)
        loss_value, *metric_values = torch.stack([loss.detach(), *metrics.values()]).tolist()
        if not math.isfinite(loss_value):
            path = objective.write_dump()
            raise NonFiniteLoss(f"the loss is {loss_value} at local step {local_step} of epoch {stepper.epoch}"
                                + (f"; what led to it is in {path}" if path else ""))
        if not complete:
            continue
        progress = stepper.step(batch.samples)

        now = perf_counter()
        samples_total += batch.samples
        recent_samples = 0.9 * recent_samples + batch.samples
        recent_seconds = 0.9 * recent_seconds + now - started
        this_step = StepReport(
            epoch=progress.epoch, updated=progress.updated, local_step=local_step, samples_total=samples_total,
            samples_accumulated=progress.samples_accumulated, swarm_samples=progress.swarm_samples,
            swarm_peers=progress.swarm_peers, samples_per_second=recent_samples / recent_seconds,
            learning_rate=stepper.optimizer.param_groups[0]["lr"], loss=loss_value,
            metrics=dict(zip(metrics, metric_values, strict=True)))
        report(this_step)
        if should_stop(this_step):
            return
        started = perf_counter()  # what others did in between, evaluation say, was no training


class LocalStepper:
    """One process alone: gradients accumulate until they stand for `target_batch_size` samples.

    An update's gradient is the mean over its samples, whatever the sizes of micro-batches. A parameter without
    a gradient counts as one with a zero gradient.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, target_batch_size: int, epoch: int = 0) -> None:
        self.optimizer, self._target_batch_size, self._epoch = optimizer, target_batch_size, epoch
        self._params = [p for group in optimizer.param_groups for p in group["params"]]
        self._mean: list[Tensor] = []
        self._samples = 0

    @property
    def epoch(self) -> int:
        return self._epoch

    def step(self, samples: int) -> Progress:
        self._accumulate(samples)
        updated = self._samples >= self._target_batch_size
        if updated:
            self._update()
        return Progress(self._epoch, self._samples, self._samples, swarm_peers=1, updated=updated)

    @torch.no_grad()
    def _accumulate(self, samples: int) -> None:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._params]
        self.optimizer.zero_grad(set_to_none=True)
        self._samples += samples
        if self._mean:
            torch._foreach_lerp_(self._mean, grads, samples / self._samples)
        else:
            self._mean = grads

    def _update(self) -> None:
        for param, grad in zip(self._params, self._mean, strict=True):
            param.grad = grad
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._mean, self._samples = [], 0
        self._epoch += 1
