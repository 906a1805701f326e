"""Optimisers from their config, with a state that a swarm can share, and steps that follow its epoch."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from training.objectives.objective import Objective
from training.optimizers.config import Optimizer
from training.optimizers.larc import LARC


def build_optimizer(config: Optimizer, params: Iterable[Any]) -> torch.optim.Optimizer:
    """The optimiser that `config` names over `params`, which are parameters or groups of them."""
    if config.name == "adamw":
        return torch.optim.AdamW(params, lr=config.lr, weight_decay=config.weight_decay)
    if config.use_larc:
        larc = config.larc
        return LARC(params, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay,
                    trust_coefficient=larc.trust_coefficient, eps=larc.eps, clip=larc.clip)
    return torch.optim.SGD(params, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


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
           epoch: Callable[[], int]) -> None:
    """Lets every step of `optimizer` take the rate that `schedule` has for `epoch()`, and tell `objective`.

    Hooks hold whoever calls the step, from any thread. The parameters must be the objective's own, not copies.
    """
    def before(*_: Any) -> None:
        now = epoch()
        for group in optimizer.param_groups:
            group["lr"] = schedule(now)
        objective.before_update(now)

    def after(*_: Any) -> None:
        objective.after_update()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
