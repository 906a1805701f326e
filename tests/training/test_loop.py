from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import repeat

import pytest
import torch
from torch import Tensor, nn

from training.data.batches import Batch
from training.loop import LocalStepper, NonFiniteLoss, Progress, StepReport, train
from training.models.config import Amp
from training.objectives.objective import Objective, build_objective
from training.optimizers.build import build_optimizer
from training.precision import Precision
from training.recipe import Training


class Scale(Objective):
    """Loss: the mean pixel times a weight that starts at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.backbone.weight)
        self.epochs: list[int] = []

    def forward(self, views: list[Tensor], labels: Tensor | None, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        self.epochs.append(epoch)
        pixels = views[0].float().mean()
        return (self.backbone.weight * pixels).sum(), {"pixels": pixels}


def batch_of(images: Tensor) -> Batch:
    return Batch(0, [images], None, len(images))


def constant_images(*values_and_sizes: tuple[int, int]) -> list[Batch]:
    return [batch_of(torch.full((size, 3, 2, 2), value, dtype=torch.uint8)) for value, size in values_and_sizes]


def crops(batch: Batch) -> list[Tensor]:
    return batch.crops


def full_precision(objective: Objective) -> Precision:
    return Precision(Amp(), torch.device("cpu"), objective.parameters())


def run(batches: Iterable[Batch], steps: int | None = None) -> tuple[Scale, list[StepReport]]:
    objective, reports = Scale(), []
    stepper = LocalStepper(torch.optim.SGD(objective.parameters(), lr=1.0), target_batch_size=8)
    train(objective, batches, crops, stepper, full_precision(objective), report=reports.append,
          should_stop=lambda step: step.local_step == steps)
    return objective, reports


def test_update_is_the_mean_over_samples_whatever_the_micro_batches() -> None:
    objective, _ = run(constant_images((1, 2), (5, 6)))
    assert objective.backbone.weight.item() == pytest.approx(1 - (2 * 1 + 6 * 5) / 8)


def test_accumulated_micro_batches_step_as_one_large_batch_does() -> None:
    images, targets = torch.randn(24, 5, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3
    weights = []
    for sizes in ([24], [8, 8, 8], [1, 16, 7]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
        stepper = LocalStepper(torch.optim.SGD(model.parameters(), lr=0.5), target_batch_size=24)
        for _ in range(3):
            for some, labels in zip(images.split(sizes), targets.split(sizes), strict=True):
                nn.functional.cross_entropy(model(some), labels).backward()
                stepper.step(len(some))
        assert stepper.epoch == 3
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weights[2], weights[0], rtol=1e-6, atol=1e-6)


def test_update_comes_when_the_target_is_reached_and_not_before() -> None:
    parameter = torch.zeros(1, requires_grad=True)
    stepper = LocalStepper(torch.optim.SGD([parameter], lr=1.0), target_batch_size=8, epoch=5)
    progress = []
    for samples in (3, 4, 2, 9, 1):
        parameter.grad = torch.ones(1)
        progress.append(stepper.step(samples))
        assert parameter.grad is None
    assert progress == [Progress(5, 3, 3, 1, updated=False), Progress(5, 7, 7, 1, updated=False),
                        Progress(6, 0, 0, 1, updated=True), Progress(7, 0, 0, 1, updated=True),
                        Progress(7, 1, 1, 1, updated=False)]
    assert parameter.item() == -2


def test_missing_gradient_counts_as_zero() -> None:
    parameters = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    stepper = LocalStepper(torch.optim.SGD(parameters, lr=1.0), target_batch_size=2)
    for present in parameters:
        present.grad = torch.ones(1)
        stepper.step(1)
    assert [p.item() for p in parameters] == [-0.5, -0.5]


def test_report_counts_samples_and_epochs() -> None:
    objective, reports = run(constant_images((1, 4), (1, 4), (3, 4)))
    assert [(r.local_step, r.epoch, r.updated, r.samples_total, r.samples_accumulated) for r in reports] == [
        (1, 0, False, 4, 4), (2, 1, True, 8, 0), (3, 1, False, 12, 4)]
    assert [(r.loss, r.metrics) for r in reports] == [(1, {"pixels": 1}), (1, {"pixels": 1}), (0, {"pixels": 3})]
    assert objective.epochs == [0, 0, 1]


def test_rate_is_that_of_recent_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    # a step begins and ends; between steps, 100 seconds pass that are none of its own
    moments = [(0.0, 2.0), (102.0, 104.0), *((204.0 + 100.5 * step, 204.5 + 100.5 * step) for step in range(200))]
    clock = iter([moment for step in moments for moment in step])
    monkeypatch.setattr("training.loop.perf_counter", lambda: next(clock))
    _, reports = run(repeat(batch_of(torch.ones(4, 3, 2, 2))), steps=100)
    assert [r.samples_per_second for r in reports[:2]] == pytest.approx([2, 2])
    assert reports[-1].samples_per_second == pytest.approx(8, rel=1e-3)


def test_training_stops_when_told_to() -> None:
    _, reports = run(repeat(batch_of(torch.ones(4, 3, 2, 2))), steps=5)
    assert len(reports) == 5


def test_training_puts_the_model_into_training_mode() -> None:
    objective = Scale().eval()
    train(objective, constant_images((1, 2)), crops, LocalStepper(torch.optim.SGD(objective.parameters(), lr=1.0), 8),
          full_precision(objective), report=lambda _: None, should_stop=lambda _: False)
    assert objective.training


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_stops_training_and_names_the_step(bad: float) -> None:
    good = torch.ones(4, 3, 2, 2)
    with pytest.raises(NonFiniteLoss, match=r"local step 4 of epoch 1"):
        run([batch_of(images) for images in (good, good, good, good * bad, good)])


def test_gradients_of_a_loss_that_is_not_finite_never_reach_the_parameters() -> None:
    objective = Scale()
    stepper = LocalStepper(torch.optim.SGD(objective.parameters(), lr=1.0), 4)
    with pytest.raises(NonFiniteLoss):
        train(objective, [batch_of(torch.full((4, 3, 2, 2), torch.nan))], crops, stepper, full_precision(objective),
              report=lambda _: None, should_stop=lambda _: False)
    assert (stepper.epoch, objective.backbone.weight.item()) == (0, 1)


def test_swav_learns_to_assign_the_views_of_a_batch(tiny: Callable[..., Training]) -> None:
    training = tiny("optimizer.lr=0.01", "optimizer.name=adamw")
    objective = build_objective(training)
    noise = torch.Generator().manual_seed(0)
    images = torch.randint(256, (12, 3, 16, 16), dtype=torch.uint8, generator=noise)

    def views(batch: Batch) -> list[Tensor]:
        scaled = batch.crops[0].float() / 128 - 1
        jittered = [scaled + 0.1 * torch.randn(scaled.shape, generator=noise) for _ in range(4)]
        return [torch.cat(jittered[:2]), torch.cat(jittered[2:])[..., ::2, ::2]]

    reports: list[StepReport] = []
    train(objective, repeat(batch_of(images), 40), views,
          LocalStepper(build_optimizer(training.optimizer, objective), 12), full_precision(objective),
          report=reports.append, should_stop=lambda _: False)
    assert reports[-1].loss < 0.7 * reports[0].loss
    assert reports[-1].metrics["prototype_entropy"] > 0.8
    assert replace(reports[-1], loss=0, metrics={}, samples_per_second=0) == StepReport(
        epoch=40, updated=True, local_step=40, samples_total=480, samples_accumulated=0, swarm_samples=0,
        swarm_peers=1, samples_per_second=0, learning_rate=0.01, loss=0, metrics={})


class Overflow(Precision):
    """Precision whose second micro-batch overflows, as float16's may."""

    backwards = 0

    def backward(self, loss: Tensor) -> bool:
        self.backwards += 1
        super().backward(loss)
        return self.backwards != 2


def test_a_micro_batch_whose_gradients_overflow_counts_for_nothing() -> None:
    objective, reports = Scale(), list[StepReport]()
    stepper = LocalStepper(torch.optim.SGD(objective.parameters(), lr=1.0), target_batch_size=8)
    train(objective, constant_images((1, 4), (9, 4), (3, 4)), crops, stepper,
          Overflow(Amp(), torch.device("cpu"), objective.parameters()), report=reports.append,
          should_stop=lambda _: False, samples_before=100)
    assert [(r.samples_total, r.updated) for r in reports] == [(104, False), (108, True)]
