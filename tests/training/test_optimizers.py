import math
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

from training.config import validate
from training.errors import BadInput
from training.objectives.objective import Objective
from training.optimizers.accum_adam import AccumAdam
from training.optimizers.build import build_optimizer, govern, initialise_state
from training.optimizers.config import Optimizer
from training.optimizers.groups import parameter_groups
from training.optimizers.larc import LARC
from training.recipe import Training


def config(**options: object) -> Optimizer:
    return Optimizer.model_validate({"lr": 0.1, "max_epochs": 10, "weight_decay": 0.1} | options)


CONFIGS = {
    "sgd": config(),
    "sgd without momentum": config(momentum=0),
    "nesterov": config(nesterov=True),
    "larc": config(use_larc=True),
    **{name: config(name=name) for name in ("adam", "adamw", "accum_adam", "accum_adamw")},
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
                decay: float, trust: float, eps: float, clip: bool, nesterov: bool) -> None:
    """The specification's formula in plain Python floats, one parameter in place."""
    weight_norm, grad_norm = math.hypot(*weights), math.hypot(*grads)
    rate, effective_decay = 1.0, 0.0
    if weight_norm and grad_norm:
        effective_decay = decay
        rate = trust * weight_norm / (grad_norm + decay * weight_norm + eps)
        rate = min(rate / lr, 1.0) if clip else rate
    for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
        step = rate * (g + effective_decay * w)
        velocity[i] = momentum * velocity[i] + step
        weights[i] = w - lr * (step + momentum * velocity[i] if nesterov else velocity[i])


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_larc_follows_the_formula(clip: bool, momentum: float, decay: float, nesterov: bool) -> None:
    options = {"trust": 0.3, "eps": 1e-8, "clip": clip, "momentum": momentum, "decay": decay, "nesterov": nesterov}
    params = [p.double().detach().requires_grad_() for p in some_parameters()]
    weights = [p.detach().flatten().tolist() for p in params]
    velocities = [[0.0] * p.numel() for p in params]
    larc = LARC(params, lr=1.0, momentum=momentum, weight_decay=decay, trust_coefficient=0.3, clip=clip,
                nesterov=nesterov)
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


@pytest.mark.parametrize("nesterov", [False, True])
def test_larc_is_plain_sgd_where_it_does_not_adapt(nesterov: bool) -> None:
    ends = []
    for kind, options in ((LARC, {"adapt": False}), (torch.optim.SGD, {})):
        params = some_parameters()
        optimizer = kind(params, lr=0.3, momentum=0.9, weight_decay=0.1, nesterov=nesterov, **options)
        for step in range(4):
            give_gradients(params, seed=step)
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in params]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-6)


ADAM = {"lr": 0.3, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.01}


@pytest.mark.parametrize(("options", "kind", "expected"), [
    ({"lr": 0.3, "momentum": 0.8, "weight_decay": 0.01, "nesterov": True}, torch.optim.SGD, {}),
    ({"lr": 0.3, "momentum": 0.8, "weight_decay": 0.01, "use_larc": True,
      "larc": {"clip": True, "eps": 1e-6, "trust_coefficient": 0.02}}, LARC,
     {"clip": True, "eps": 1e-6, "trust_coefficient": 0.02, "nesterov": False, "adapt": True}),
    ({"name": "adam", **ADAM}, torch.optim.Adam, {"decoupled_weight_decay": False}),
    ({"name": "adamw", **ADAM}, torch.optim.AdamW, {"decoupled_weight_decay": True}),
    ({"name": "accum_adam", "accum_iter": 7, **ADAM}, AccumAdam, {"decoupled": False}),
    ({"name": "accum_adamw", "accum_iter": 7, **ADAM}, AccumAdam, {"decoupled": True}),
])
def test_options_reach_the_optimiser(options: dict[str, object], kind: type, expected: dict[str, object]) -> None:
    optimizer = build_optimizer(config(**options), some_parameters())
    assert type(optimizer) is kind
    expected |= {key: value for key, value in options.items() if key not in ("name", "use_larc", "larc")}
    assert {key: optimizer.param_groups[0][key] for key in expected} == expected


class Menagerie(nn.Module):
    """Parameters of all kinds, under names that say the opposite."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1 = nn.Linear(3, 3)
        self.conv = nn.BatchNorm2d(3)
        self.fc = nn.Sequential(nn.SyncBatchNorm(3), nn.GroupNorm(1, 3), nn.LayerNorm(3), LayerNorm2d(3),
                                nn.InstanceNorm1d(3, affine=True), nn.RMSNorm(3))
        self.norm = nn.MultiheadAttention(3, 1, add_bias_kv=True)
        self.bias_of_class = nn.Parameter(torch.zeros(1, 3))
        self.again = self.bn1

    def names(self, params: list[Tensor]) -> set[str]:
        return {name for name, param in self.named_parameters() if any(param is other for other in params)}


WEIGHTS = {"bn1.weight", "norm.in_proj_weight", "norm.out_proj.weight", "bias_of_class"}
BIASES = {"bn1.bias", "norm.in_proj_bias", "norm.bias_k", "norm.bias_v", "norm.out_proj.bias"}
NORM_WEIGHTS = {"conv.weight", *(f"fc.{index}.weight" for index in range(6))}
NORM_BIASES = {"conv.bias", *(f"fc.{index}.bias" for index in range(5))}
EVERYTHING = WEIGHTS | BIASES | NORM_WEIGHTS | NORM_BIASES


@pytest.mark.parametrize(("regularize_bn", "regularize_bias", "exempt"), [
    (True, True, set()),
    (False, True, NORM_WEIGHTS | NORM_BIASES),
    (True, False, BIASES | NORM_BIASES),
    (False, False, BIASES | NORM_WEIGHTS | NORM_BIASES),
])
def test_the_modules_type_tells_what_is_exempt_from_decay(regularize_bn: bool, regularize_bias: bool,
                                                          exempt: set[str]) -> None:
    module = Menagerie()
    options = config(regularize_bn=regularize_bn, regularize_bias=regularize_bias)
    groups = parameter_groups(options, module)
    found = {group["weight_decay"]: module.names(group["params"]) for group in groups}
    assert found == {0.1: EVERYTHING - exempt} | ({0.0: exempt} if exempt else {})
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))


@pytest.mark.parametrize("regularize_bias", [True, False])
def test_larc_can_leave_out_biases_and_norms_whether_they_decay_or_not(regularize_bias: bool) -> None:
    module = Menagerie()
    options = config(use_larc=True, larc={"exclude_bias_and_norm": True}, regularize_bias=regularize_bias)
    larc = build_optimizer(options, module)
    assert isinstance(larc, LARC)
    adapted = [p for group in larc.param_groups if group["adapt"] for p in group["params"]]
    decayed = [p for group in larc.param_groups if group["weight_decay"] for p in group["params"]]
    assert module.names(adapted) == WEIGHTS
    assert module.names(decayed) == (EVERYTHING if regularize_bias else EVERYTHING - BIASES - NORM_BIASES)


@each_optimiser
def test_exempt_parameters_stay_where_they_are_without_a_gradient_to_move_them(config: Optimizer) -> None:
    module = Menagerie()
    for p in module.parameters():
        nn.init.ones_(p).grad = torch.zeros_like(p)
    options = config.model_copy(update={"regularize_bn": False, "regularize_bias": False, "use_larc": False})
    build_optimizer(options, parameter_groups(options, module)).step()
    assert module.names([p for p in module.parameters() if bool((p != 1).any())]) == WEIGHTS


def test_parameters_without_groups_are_refused_where_some_are_exempt() -> None:
    with pytest.raises(AssertionError, match="parameter_groups"):
        build_optimizer(config(regularize_bn=False), some_parameters())


@pytest.mark.parametrize(("options", "message"), [
    ({"name": "adam", "use_larc": True}, "LARC scales the steps of sgd only"),
    ({"name": "accum_adamw", "use_larc": True}, "LARC scales the steps of sgd only"),
    ({"larc": {"clip": True}}, "larc at its default, .*use_larc = false has no use for it"),
    ({"name": "adam", "momentum": 0.8}, "momentum at its default, 0.9: name = 'adam' has no use for it"),
    ({"name": "adamw", "nesterov": True}, "nesterov at its default"),
    ({"betas": [0.9, 0.99]}, "betas at its default"),
    ({"eps": 1e-6}, "eps at its default"),
    ({"name": "adam", "accum_iter": 8}, "accum_iter at its default, 4: name = 'adam' has no use for it"),
    ({"name": "accum_adam", "accum_iter": 0}, "greater than or equal to 1"),
    ({"name": "adam", "betas": [0.9, 1.0]}, "less than 1"),
    ({"nesterov": True, "momentum": 0}, "nesterov = false, or a momentum above 0"),
    ({"lr": 0}, "greater than 0"),
    ({"lr": float("nan")}, "finite number"),
    ({"grad_clip_norm": -1}, "greater than or equal to 0"),
    ({"name": "lars"}, "'sgd', 'adam', 'adamw', 'accum_adam' or 'accum_adamw'"),
])
def test_a_combination_without_sense_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**options)


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
    per_parameter = {"sgd": int(config.momentum > 0), "adam": 3, "adamw": 3, "accum_adam": 4, "accum_adamw": 4}
    assert len(state) == 3 * per_parameter[config.name]
    assert all(not value.any() for value in state)


@each_optimiser
def test_first_steps_are_those_of_an_optimiser_that_was_not_initialised(config: Optimizer) -> None:
    plain, prepared = some_parameters(), some_parameters()
    optimizers = [build_optimizer(config, plain), build_optimizer(config, prepared)]
    initialise_state(optimizers[1])
    for step in range(6):
        for params, optimizer in zip((plain, prepared), optimizers, strict=True):
            give_gradients(params, seed=step)
            optimizer.step()
    assert bits(plain) == bits(prepared)


def test_vissls_name_for_larcs_options_is_answered_with_ours() -> None:
    with pytest.raises(BadInput, match=r"It is `optimizer\.larc` here"):
        validate(Training, {"name": "x", "optimizer": {"lr": 1, "max_epochs": 2, "larc_config": {"clip": True}}})


class Recorder(Objective):
    """Notes what happens around an update."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(2, 2)
        self.calls: list[tuple[str, object]] = []

    def forward(self, views: list[Tensor], labels: Tensor | None, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
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


@pytest.mark.parametrize("limit", [None, 0.0, 2.0, 100.0])
def test_the_whole_updates_gradient_is_clipped_to_one_norm(limit: float | None) -> None:
    """Its direction stays: neither each parameter nor each group is clipped by itself."""
    objective = Recorder()
    weight, bias = objective.backbone.weight, objective.backbone.bias
    starts = [p.detach().clone() for p in (weight, bias)]
    optimizer = torch.optim.SGD([{"params": [weight]}, {"params": [bias], "weight_decay": 0.0}], lr=99.0)
    govern(optimizer, objective, lambda _: 1.0, lambda: 0, grad_clip_norm=limit)
    weight.grad, bias.grad = torch.full((2, 2), 4.0), torch.full((2,), 1.0)  # norms 8 and 1.4
    optimizer.step()
    scale = 2.0 / math.sqrt(4 * 16 + 2) if limit == 2.0 else 1.0
    for param, start, grad in zip((weight, bias), starts, (4.0, 1.0), strict=True):
        torch.testing.assert_close(start - param.detach(), torch.full_like(param, grad * scale), rtol=1e-5, atol=1e-5)


def test_what_the_objective_freezes_does_not_count_towards_the_norm() -> None:
    class Freezing(Recorder):
        def before_update(self, epoch: int) -> None:
            self.backbone.weight.grad = None

    objective = Freezing()
    weight, bias = objective.backbone.weight, nn.init.zeros_(objective.backbone.bias)
    optimizer = torch.optim.SGD([weight, bias], lr=99.0)
    govern(optimizer, objective, lambda _: 1.0, lambda: 0, grad_clip_norm=10.0)
    weight.grad, bias.grad = torch.full((2, 2), 1e6), torch.full((2,), 4.0)
    optimizer.step()
    assert bias.tolist() == [-4.0, -4.0]
