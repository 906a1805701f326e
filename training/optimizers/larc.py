"""SGD with layer-wise adaptive rate control (You, Gitman and Ginsburg, arXiv 1708.03888)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LARC(torch.optim.Optimizer):
    """SGD with momentum in which each parameter's gradient is first scaled to the parameter's norm.

    With w a parameter, g its gradient, d the weight decay, c the trust coefficient:
    a = c |w| / (|g| + d |w| + eps), at most lr where `clip` is on, and then over lr;
    v <- momentum v + a (g + d w);  w <- w - lr v, or with `nesterov`, w <- w - lr (momentum v + a (g + d w)).
    Where |w| or |g| is zero, a = 1 and d = 0. (The formula of Apex's LARC, which VISSL uses.)
    A group whose `adapt` is off has a = 1: plain SGD.
    """

    def __init__(self, params: Iterable[Any], *, lr: float = 1e-3, momentum: float = 0.0, weight_decay: float = 0.0,
                 nesterov: bool = False, trust_coefficient: float = 0.001, eps: float = 1e-8, clip: bool = False,
                 adapt: bool = True) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov,
                                  "trust_coefficient": trust_coefficient, "eps": eps, "clip": clip, "adapt": adapt})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if params := [p for p in group["params"] if p.grad is not None]:
                self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        steps = _scaled_gradients(params, group)
        if group["momentum"]:
            velocity = [self._velocity(p) for p in params]
            torch._foreach_mul_(velocity, group["momentum"])
            torch._foreach_add_(velocity, steps)
            if group["nesterov"]:
                torch._foreach_add_(steps, velocity, alpha=group["momentum"])
            else:
                steps = velocity
        torch._foreach_add_(params, steps, alpha=-group["lr"])

    def _velocity(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        velocity: Tensor = state["momentum_buffer"]
        return velocity


def _scaled_gradients(params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """a (g + d w) of every parameter, in new tensors; the norms stay on their device."""
    grads, decay = [p.grad for p in params if p.grad is not None], group["weight_decay"]
    if not group["adapt"]:
        return list(torch._foreach_add(grads, params, alpha=decay))
    weight_norms, grad_norms = (torch.stack(torch._foreach_norm(tensors)) for tensors in (params, grads))
    rates = group["trust_coefficient"] * weight_norms / (grad_norms + decay * weight_norms + group["eps"])
    if group["clip"]:
        rates = (rates / group["lr"]).clamp(max=1)
    nonzero = (weight_norms > 0) & (grad_norms > 0)
    scaled = torch._foreach_mul(grads, rates.where(nonzero, 1).unbind())
    if decay:
        torch._foreach_add_(scaled, torch._foreach_mul(params, (decay * rates).where(nonzero, 0).unbind()))
    return list(scaled)
