"""AccumAdam and AccumAdamW: Adam for replicas that average their parameters (the PyPI package decent-dp has both)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class AccumAdam(torch.optim.Optimizer):
    """Adam whose moments move once every K = `accum_iter` steps, by the mean gradient of those steps.

    With x a parameter, g its gradient, k its steps so far, this one included, and e = ceil(k / K):
    a <- a + g / K;  m' = m + (1 - b1) g;  v' = v + (1 - b2) g^2;
    x <- x - lr (m' / (1 - b1^e)) / (sqrt(v' / (1 - b2^e)) + eps);
    and where K divides k: m <- b1 (m + (1 - b1) a), v <- b2 (v + (1 - b2) a^2), a <- 0.
    Weight decay d comes first: g <- g + d x, or where it is `decoupled`, x <- x - lr d x. With K = 1 it is Adam.
    """

    def __init__(self, params: Iterable[Any], *, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, accum_iter: int = 4, decoupled: bool = False) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
                                  "accum_iter": accum_iter, "decoupled": decoupled})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for step, params in self._by_step(group["params"]).items():
                _update(params, [self.state[p] for p in params], step, group)
        return loss

    def _by_step(self, params: list[Tensor]) -> dict[int, list[Tensor]]:
        """Those that have a gradient, under the number of this step: one without has missed steps of the others."""
        together: dict[int, list[Tensor]] = {}
        for param in params:
            if param.grad is not None:
                state = self.state[param]
                if not state:
                    # as torch's: a tensor, so that it is saved and downloaded, and on the CPU, so that nobody waits
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state |= {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq", "accum_grad")}
                state["step"] += 1
                together.setdefault(int(state["step"]), []).append(param)
        return together


def _update(params: list[Tensor], states: list[dict[str, Tensor]], step: int, group: dict[str, Any]) -> None:
    """One step of parameters that have all made equally many."""
    (beta1, beta2), every, decay = group["betas"], group["accum_iter"], group["weight_decay"]
    grads = [p.grad for p in params if p.grad is not None]
    if decay and group["decoupled"]:
        torch._foreach_mul_(params, 1 - group["lr"] * decay)
    elif decay:
        grads = list(torch._foreach_add(grads, params, alpha=decay))
    first, second, gathered = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "accum_grad"))
    torch._foreach_add_(gathered, grads, alpha=1 / every)
    exponent = -(-step // every)
    numerator = torch._foreach_add(first, grads, alpha=1 - beta1)
    denominator = torch._foreach_addcmul(second, grads, grads, value=1 - beta2)
    torch._foreach_sqrt_(denominator)
    torch._foreach_div_(denominator, (1 - beta2**exponent) ** 0.5)
    torch._foreach_add_(denominator, group["eps"])
    torch._foreach_addcdiv_(params, numerator, denominator, value=-group["lr"] / (1 - beta1**exponent))
    if step % every == 0:
        torch._foreach_add_(first, gathered, alpha=1 - beta1)
        torch._foreach_mul_(first, beta1)
        torch._foreach_addcmul_(second, gathered, gathered, value=1 - beta2)
        torch._foreach_mul_(second, beta2)
        torch._foreach_zero_(gathered)
