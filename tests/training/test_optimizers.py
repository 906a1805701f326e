import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from training.objectives.objective import Objective
from training.optimizers.build import build_optimizer, govern, initialise_state
from training.optimizers.config import Larc, Optimizer
from training.optimizers.larc import LARC

CONFIGS = {
    "sgd": Optimizer(lr=0.1, max_epochs=10, weight_decay=0.1),
    "sgd without momentum": Optimizer(lr=0.1, max_epochs=10, weight_decay=0.1, momentum=0),
    "larc": Optimizer(lr=0.1, max_epochs=10, weight_decay=0.1, use_larc=True),
    "adamw": Optimizer(name="adamw", lr=0.1, max_epochs=10, weight_decay=0.1),
}
each_optimiser = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def some_parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    params = [torch.randn(4, 3, generator=generator), torch.randn(5, generator=generator), torch.zeros(2)]
    params[1][0] = -0.0
    return [p.requires_grad_() for p in params]


def give_gradients(params: list[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def bits(tensors: list[Tensor]) -> list[list[int]]:
    return [t.detach().flatten().view(torch.int32).tolist() for t in tensors]


def scalar_larc(weights: list[float], grads: list[float], velocity: list[float], *, lr: float, momentum: float,
                decay: float, trust: float, eps: float, clip: bool) -> None:
    """The specification's formula in plain Python floats, one parameter in place."""
    weight_norm, grad_norm = math.hypot(*weights), math.hypot(*grads)
    rate, effective_decay = 1.0, 0.0
    if weight_norm and grad_norm:
        effective_decay = decay
        rate = trust * weight_norm / (grad_norm + decay * weight_norm + eps)
        rate = min(rate / lr, 1.0) if clip else rate
    for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
        velocity[i] = momentum * velocity[i] + rate * (g + effective_decay * w)
        weights[i] = w - lr * velocity[i]


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_larc_follows_the_formula(clip: bool, momentum: float, decay: float) -> None:
    options = {"trust": 0.3, "eps": 1e-8, "clip": clip, "momentum": momentum, "decay": decay}
    params = [p.double().detach().requires_grad_() for p in some_parameters()]
    weights = [p.detach().flatten().tolist() for p in params]
    velocities = [[0.0] * p.numel() for p in params]
    larc = LARC(params, lr=1.0, momentum=momentum, weight_decay=decay, trust_coefficient=0.3, clip=clip)
    for step, lr in enumerate([0.1, 0.5, 0.02, 2.0]):
        larc.param_groups[0]["lr"] = lr
        give_gradients(params, seed=step)
        if step == 2:
            params[0].grad.zero_()
        for p, w, v in zip(params, weights, velocities, strict=True):
            scalar_larc(w, p.grad.flatten().tolist(), v, lr=lr, **options)
        larc.step()
        for p, w in zip(params, weights, strict=True):
            assert p.detach().flatten().tolist() == pytest.approx(w, rel=1e-12, abs=1e-12)


def test_larc_leaves_a_parameter_without_gradient_alone() -> None:
    params = some_parameters()
    before = bits(params)
    larc = LARC(params, lr=1.0, momentum=0.9, weight_decay=0.1)
    larc.step()
    assert bits(params) == before
    assert not larc.state


def test_larc_is_indifferent_to_the_scale_of_gradients() -> None:
    """Without decay, and eps aside: that is what it is for."""
    ends = []
    for scale in (1.0, 1000.0):
        params = some_parameters()[:2]
        larc = LARC(params, lr=1.0, momentum=0.9)
        for step in range(3):
            give_gradients(params, seed=step)
            for p in params:
                p.grad *= scale
            larc.step()
        ends.append(torch.cat([p.detach().flatten() for p in params]))
    torch.testing.assert_close(ends[0], ends[1])


def test_options_reach_the_optimiser() -> None:
    larc = build_optimizer(Optimizer(lr=0.3, max_epochs=9, momentum=0.8, weight_decay=0.01, use_larc=True,
                                     larc=Larc(clip=True, eps=1e-6, trust_coefficient=0.02)), some_parameters())
    assert isinstance(larc, LARC)
    expected = {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.01, "clip": True, "eps": 1e-6, "trust_coefficient": 0.02}
    assert {key: larc.param_groups[0][key] for key in expected} == expected
    adamw = build_optimizer(CONFIGS["adamw"], some_parameters())
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.param_groups[0]["weight_decay"] == 0.1


@each_optimiser
def test_initialised_state_is_zero_and_moves_no_parameter(config: Optimizer) -> None:
    params = some_parameters()
    give_gradients(params, seed=0)
    before = bits(params), bits([p.grad for p in params])
    optimizer = build_optimizer(config, params)
    fired = []
    optimizer.register_step_pre_hook(lambda *_: fired.append(1))
    initialise_state(optimizer)
    assert (bits(params), bits([p.grad for p in params])) == before
    assert fired == []
    state = [value for p in params for value in optimizer.state[p].values() if value is not None]
    assert len(state) == {"adamw": 9}.get(config.name, 3 if config.momentum else 0)
    assert all(not value.any() for value in state)


@each_optimiser
def test_first_steps_are_those_of_an_optimiser_that_was_not_initialised(config: Optimizer) -> None:
    plain, prepared = some_parameters(), some_parameters()
    optimizers = [build_optimizer(config, plain), build_optimizer(config, prepared)]
    initialise_state(optimizers[1])
    for step in range(3):
        for params, optimizer in zip((plain, prepared), optimizers, strict=True):
            give_gradients(params, seed=step)
            optimizer.step()
    assert bits(plain) == bits(prepared)


class Recorder(Objective):
    """Notes what happens around an update."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(2, 2)
        self.calls: list[tuple[str, object]] = []

    def forward(self, views: list[Tensor], epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError

    def before_update(self, epoch: int) -> None:
        self.calls.append(("before", epoch))

    def after_update(self) -> None:
        self.calls.append(("after", round(self.backbone.bias[0].item(), 6)))


@pytest.mark.parametrize("make", [torch.optim.SGD, LARC])
def test_every_step_follows_the_epoch_and_tells_the_objective(make: Callable[..., torch.optim.Optimizer]) -> None:
    objective, epoch = Recorder(), 4
    nn.init.zeros_(objective.backbone.bias)
    optimizer = make([objective.backbone.bias], lr=99.0)
    govern(optimizer, objective, lambda e: e / 10, lambda: epoch)
    for epoch in (4, 7):  # noqa: B007  # read by the lambda
        objective.backbone.bias.grad = torch.ones(2)
        nn.init.zeros_(objective.backbone.bias)  # LARC takes a zero parameter's gradient as it is
        optimizer.step()
    assert objective.calls == [("before", 4), ("after", -0.4), ("before", 7), ("after", -0.7)]
