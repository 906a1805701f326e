"""Optimisers from their config, with a state that a swarm can share, and steps that follow its epoch."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from training.objectives.objective import Objective
from training.optimizers.accum_adam import AccumAdam
from training.optimizers.config import Optimizer
from training.optimizers.groups import parameter_groups
from training.optimizers.larc import LARC


def build_optimizer(config: Optimizer, params: nn.Module | Iterable[Any]) -> torch.optim.Optimizer:
    """The optimiser that `config` names over a module's parameters, or over parameters or groups of them.

    Only a module, or its `parameter_groups`, tells the parameters that are exempt from decay or LARC from the rest.
    """
    params = parameter_groups(config, params) if isinstance(params, nn.Module) else list(params)
    if not (config.regularize_bn and config.regularize_bias) or config.larc.exclude_bias_and_norm:
        assert all(isinstance(group, dict) and "weight_decay" in group for group in params), "need parameter_groups"
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.name == "sgd":
        common |= {"momentum": config.momentum, "nesterov": config.nesterov}
        if not config.use_larc:
            return torch.optim.SGD(params, **common)
        larc = config.larc
        return LARC(params, **common, trust_coefficient=larc.trust_coefficient, eps=larc.eps, clip=larc.clip)
    common |= {"betas": config.betas, "eps": config.eps}
    if config.name in ("adam", "adamw"):
        return (torch.optim.Adam if config.name == "adam" else torch.optim.AdamW)(params, **common)
    return AccumAdam(params, **common, accum_iter=config.accum_iter, decoupled=config.name == "accum_adamw")


def initial_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A state dict with all state tensors of `optimizer`'s kind, zero, step counters too, and with its options.

    A twin of the optimiser makes it by one step on zeros: a step of `optimizer` itself would decay its weights and
    set off its hooks.
    """
    groups = [dict(group, params=[_zero_with_gradient(p) for p in group["params"]])
              for group in optimizer.param_groups]
    twin = type(optimizer)(groups)  # type: ignore[call-arg]  # the options are in the groups
    twin.step()
    for state in twin.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()
    return twin.state_dict()


def initialise_state(optimizer: torch.optim.Optimizer) -> None:
    """Gives `optimizer` its initial state; a peer needs that structure to download the swarm's state into."""
    optimizer.load_state_dict(initial_state(optimizer))


def _zero_with_gradient(param: Tensor) -> Tensor:
    zero = torch.zeros_like(param, requires_grad=True)
    zero.grad = torch.zeros_like(param)
    return zero


def govern(optimizer: torch.optim.Optimizer, objective: Objective, schedule: Callable[[int], float],
           epoch: Callable[[], int], grad_clip_norm: float | None = None) -> None:
    """Lets every step of `optimizer` take the rate that `schedule` has for `epoch()`, and tell `objective`.

    With `grad_clip_norm`, the gradient is then scaled down to that norm over all parameters together, where it is
    longer (Pascanu et al., arXiv 1211.5063); what the objective has frozen counts no more. None or 0: left as it is.
    Hooks hold whoever calls the step, from any thread. The parameters must be the objective's own, not copies.
    """
    def before(*_: Any) -> None:
        now = epoch()
        for group in optimizer.param_groups:
            group["lr"] = schedule(now)
        objective.before_update(now)
        if grad_clip_norm:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], grad_clip_norm)

    def after(*_: Any) -> None:
        objective.after_update()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
