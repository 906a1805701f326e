from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, StepLR

from training.optimizers.config import Optimizer
from training.optimizers.schedule import learning_rate, total_updates

LENGTH = 40
SCHEDULERS: dict[str, tuple[dict[str, object], Callable[[SGD], LRScheduler]]] = {
    "step": ({"step_size": 7, "gamma": 0.5}, lambda sgd: StepLR(sgd, 7, 0.5)),
    "multi_step": ({"milestones": [11, 12, 30], "gamma": 0.1}, lambda sgd: MultiStepLR(sgd, [11, 12, 30], 0.1)),
    "constant": ({}, lambda sgd: ConstantLR(sgd, 1.0)),
}


def config(**options: object) -> Optimizer:
    length = {} if {"max_epochs", "num_epochs"} & options.keys() else {"max_epochs": LENGTH}
    return Optimizer.model_validate({"lr": 4.8} | length | options)


def rate(config: Optimizer, epoch: int, batch_size: int = 1, images_per_pass: int = 1) -> float:
    return learning_rate(config, epoch, batch_size=batch_size, images_per_pass=images_per_pass)


def torchs_rates(make: Callable[[SGD], LRScheduler], count: int) -> list[float]:
    sgd = SGD([torch.zeros(1, requires_grad=True)], lr=4.8)
    scheduler, rates = make(sgd), []
    for _ in range(count):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        scheduler.step()
    return rates


def torchs_warm_up(warmup: int) -> list[float]:
    return torchs_rates(lambda sgd: LinearLR(sgd, 0.3 / 4.8, 1.0, warmup), warmup) if warmup else []


@pytest.mark.parametrize(("warmup", "last"), [(0, 30), (1, 30), (10, 100), (5, 6)])
def test_warm_up_and_cosine_equal_torchs(warmup: int, last: int) -> None:
    ours = config(warmup_start_lr=0.3 if warmup else 0.0, warmup_epochs=warmup, max_epochs=last, eta_min=0.0048)
    theirs = torchs_warm_up(warmup)
    theirs += torchs_rates(lambda sgd: CosineAnnealingLR(sgd, last - warmup, eta_min=0.0048), last - warmup)
    assert [rate(ours, epoch) for epoch in range(last)] == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_other_schedules_equal_torchs_counted_from_the_start_of_the_run(name: str, warmup: int) -> None:
    options, make = SCHEDULERS[name]
    ours = config(lr_scheduler=name, warmup_start_lr=0.3 if warmup else 0.0, warmup_epochs=warmup, **options)
    theirs = torchs_warm_up(warmup) + torchs_rates(make, LENGTH)[warmup:]
    assert [rate(ours, epoch) for epoch in range(LENGTH)] == pytest.approx(theirs, rel=1e-6)


def test_rate_stays_at_its_minimum_after_the_last_epoch() -> None:
    ours = config(lr=1.0, max_epochs=10, eta_min=0.25)
    assert [rate(ours, epoch) for epoch in (10, 11, 1000)] == [0.25] * 3


def test_rate_begins_at_the_warm_ups_start_and_peaks_at_its_end() -> None:
    ours = config(lr=2.0, warmup_start_lr=0.5, warmup_epochs=4, max_epochs=8)
    assert [rate(ours, epoch) for epoch in range(5)] == [0.5, 0.875, 1.25, 1.625, 2.0]


def test_warm_up_may_fill_the_whole_course() -> None:
    ours = config(lr=1.0, warmup_epochs=4, max_epochs=4, eta_min=0.1)
    assert [rate(ours, epoch) for epoch in (3, 4)] == [0.75, 0.1]


@pytest.mark.parametrize(("in_passes", "in_updates"), [
    ({"eta_min": 0.01}, {"eta_min": 0.01}),
    ({"lr_scheduler": "step", "step_size": 3}, {"lr_scheduler": "step", "step_size": 15}),
    ({"lr_scheduler": "multi_step", "milestones": [3, 5]}, {"lr_scheduler": "multi_step", "milestones": [15, 25]}),
])
def test_passes_count_as_the_updates_that_they_take(in_passes: dict[str, object],
                                                    in_updates: dict[str, object]) -> None:
    """50 images in updates of 10: five updates a pass."""
    passes = config(num_epochs=6, warmup_epochs=2, warmup_start_lr=0.1, **in_passes)
    updates = config(max_epochs=30, warmup_epochs=10, warmup_start_lr=0.1, **in_updates)
    assert [rate(passes, epoch, 10, 50) for epoch in range(40)] == pytest.approx(
        [rate(updates, epoch) for epoch in range(40)])


def test_passes_are_counted_in_fractions() -> None:
    """1000 images in updates of 300: after 3 updates 0.9 passes are made, after 4 it is 1.2."""
    steps = config(lr=1.0, num_epochs=9, lr_scheduler="step", step_size=1, gamma=0.5)
    assert [rate(steps, epoch, 300, 1000) for epoch in (3, 4, 6, 7)] == [1.0, 0.5, 0.5, 0.25]
    warming = config(lr=1.0, num_epochs=9, warmup_epochs=1.5)
    assert rate(warming, 3, 300, 1000) == pytest.approx(0.9 / 1.5)
    assert rate(steps, 30 * 10, 300, 3000) == 0.5**30  # exactly 30 passes: not a hair less


def test_a_run_takes_as_many_updates_as_its_passes_need() -> None:
    assert total_updates(config(max_epochs=70), batch_size=10, images_per_pass=50) == 70
    assert total_updates(config(num_epochs=6), batch_size=10, images_per_pass=50) == 30
    imagenet = config(num_epochs=90)
    updates = total_updates(imagenet, batch_size=1024, images_per_pass=1_281_167)
    assert (updates - 1) * 1024 < 90 * 1_281_167 <= updates * 1024
    assert rate(imagenet, updates - 1, 1024, 1_281_167) > 0 == rate(imagenet, updates, 1024, 1_281_167)


def test_the_peak_alone_scales_with_the_batch() -> None:
    ours = config(lr=0.3, base_lr_batch_size=256, warmup_start_lr=0.3, warmup_epochs=10, max_epochs=100,
                  eta_min=0.0048)
    assert [rate(ours, epoch, batch_size=4096) for epoch in (0, 10, 100)] == pytest.approx([0.3, 4.8, 0.0048])
    assert [rate(ours, epoch, batch_size=256) for epoch in (0, 10, 100)] == pytest.approx([0.3, 0.3, 0.0048])


def test_a_batch_that_scales_the_peak_below_warm_up_or_the_end_is_refused() -> None:
    ours = config(lr=0.3, base_lr_batch_size=256, warmup_start_lr=0.3, warmup_epochs=10)
    ours.require_order(256)
    with pytest.raises(ValueError, match=r"warmup_start_lr of at most lr = 0\.3 x 128 / 256 = 0\.15, not 0\.3"):
        ours.require_order(128)


@pytest.mark.parametrize(("options", "message"), [
    ({"max_epochs": 0}, "one of max_epochs .* not neither"),
    ({"max_epochs": 10, "num_epochs": 10}, "not both: set the other to 0"),
    ({"warmup_epochs": 41}, "warmup_epochs within max_epochs = 40, not 41"),
    ({"num_epochs": 5, "warmup_epochs": 5.5}, "warmup_epochs within num_epochs = 5, not 5.5"),
    ({"warmup_start_lr": 0.1}, "warmup_start_lr at its default, 0.0: warmup_epochs = 0 has no use for it"),
    ({"warmup_start_lr": 5, "warmup_epochs": 2}, "warmup_start_lr of at most lr = 4.8, not 5"),
    ({"eta_min": 5}, "eta_min of at most lr = 4.8, not 5"),
    ({"step_size": 3}, "step_size at its default, 0: lr_scheduler = 'cosine' has no use for it"),
    ({"gamma": 0.3}, "gamma at its default"),
    ({"milestones": [3]}, "milestones at its default"),
    ({"lr_scheduler": "constant", "eta_min": 0.1}, "eta_min at its default"),
    ({"lr_scheduler": "step"}, "step_size above 0"),
    ({"lr_scheduler": "step", "step_size": 3, "milestones": [3]}, "milestones at its default"),
    ({"lr_scheduler": "step", "step_size": 3, "gamma": 1.5}, "less than 1"),
    ({"lr_scheduler": "multi_step"}, r"milestones that ascend, .* not \[\]"),
    ({"lr_scheduler": "multi_step", "milestones": [9, 5]}, r"milestones that ascend, .* not \[9, 5\]"),
    ({"lr_scheduler": "multi_step", "milestones": [3], "warmup_epochs": 5}, "from above warmup_epochs"),
    ({"lr_scheduler": "plateau"}, "'cosine', 'step', 'multi_step' or 'constant'"),
])
def test_a_schedule_without_sense_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**options)
