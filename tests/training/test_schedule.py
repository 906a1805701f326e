import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from training.optimizers.config import Optimizer
from training.optimizers.schedule import learning_rate


@pytest.mark.parametrize(("warmup", "last"), [(0, 30), (1, 30), (10, 100), (5, 6)])
def test_rate_equals_torchs_warm_up_and_cosine(warmup: int, last: int) -> None:
    config = Optimizer(lr=4.8, warmup_start_lr=0.3, warmup_epochs=warmup, max_epochs=last, eta_min=0.0048)
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
    cosine = CosineAnnealingLR(sgd, last - warmup, eta_min=config.eta_min)
    scheduler = SequentialLR(sgd, [LinearLR(sgd, 0.3 / 4.8, 1.0, warmup), cosine], [warmup]) if warmup else cosine
    for epoch in range(last):
        assert learning_rate(config, epoch) == pytest.approx(sgd.param_groups[0]["lr"], rel=1e-6)
        sgd.step()
        scheduler.step()


def test_rate_stays_at_its_minimum_after_the_last_epoch() -> None:
    config = Optimizer(lr=1.0, max_epochs=10, eta_min=0.25)
    assert [learning_rate(config, epoch) for epoch in (10, 11, 1000)] == [0.25] * 3


def test_rate_begins_at_the_warm_ups_start_and_peaks_at_its_end() -> None:
    config = Optimizer(lr=2.0, warmup_start_lr=0.5, warmup_epochs=4, max_epochs=8)
    assert [learning_rate(config, epoch) for epoch in range(5)] == [0.5, 0.875, 1.25, 1.625, 2.0]


def test_warm_up_may_fill_the_whole_course() -> None:
    config = Optimizer(lr=1.0, warmup_epochs=4, max_epochs=4, eta_min=0.1)
    assert [learning_rate(config, epoch) for epoch in (3, 4)] == [0.75, 0.1]
