"""Mixed precision of a training step: autocast, and for float16 a scaled loss."""

import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from training.errors import BadInput
from training.models.config import Amp

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
INITIAL_SCALE, SMALLEST_SCALE = 2.0**16, 2.0**-10
INITIAL_STATE = {"loss_scale": INITIAL_SCALE, "good_steps": 0}  # of float16; the others have none
GROWTH_INTERVAL = 2000  # good micro-batches after which the scale is doubled (as in torch.amp and Apex)
log = logging.getLogger(__name__)


class Precision:
    """What `model.amp` asks for, on `device`, for gradients of `parameters`, which stay float32.

    float16 loses gradients below 6e-8, so the loss is multiplied by a scale, and the gradients divided by it
    (Micikevicius et al., arXiv 1710.03740, section 3.2). Raises BadInput for float16 on a CPU.
    """

    def __init__(self, amp: Amp, device: torch.device, parameters: Iterable[nn.Parameter], *,
                 all_agree: Callable[[bool], bool] = bool) -> None:
        """`all_agree`: whether all processes that keep step are given True; of float16's overflows only."""
        self.dtype = DTYPES[amp.dtype] if amp.use_amp else torch.float32
        if self.dtype == torch.float16 and device.type == "cpu":
            raise BadInput("model.amp.dtype = 'fp16' on a CPU", expected="bf16 there: float16 is slower than float32",
                           mend="Set model.amp.dtype=bf16 or model.amp.use_amp=false for all, or join with a GPU.")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = amp.tf32
        self._device, self._parameters, self._all_agree = device, list(parameters), all_agree
        self._scale, self._good_steps = INITIAL_SCALE if self.dtype == torch.float16 else 1.0, 0

    def autocast(self) -> torch.autocast:
        """Around the forward pass."""
        if self.dtype == torch.float32:
            return torch.autocast(self._device.type, enabled=False)
        return torch.autocast(self._device.type, dtype=self.dtype)

    def backward(self, loss: Tensor) -> bool:
        """The gradients of `loss`. False: they overflowed float16 and are dropped, and the scale is halved.

        Raises ArithmeticError where a finite loss overflows at every scale.
        """
        if self.dtype != torch.float16:
            torch.autograd.backward(loss)
            return True
        torch.autograd.backward(loss * self._scale)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        torch._foreach_mul_(gradients, 1 / self._scale)
        if self._all_agree(bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())):
            self._grow()
            return True
        for parameter in self._parameters:
            parameter.grad = None
        self._shrink()
        return False

    def _grow(self) -> None:
        self._good_steps += 1
        if self._good_steps == GROWTH_INTERVAL:
            self._scale, self._good_steps = self._scale * 2, 0

    def _shrink(self) -> None:
        self._scale, self._good_steps = self._scale / 2, 0
        log.info("gradients overflowed float16: this micro-batch is dropped, the loss scale lowered to %g", self._scale)
        if self._scale < SMALLEST_SCALE:
            raise ArithmeticError("gradients overflow float16 at every loss scale; model.amp.dtype=bf16 has the range")

    def state(self) -> dict[str, float]:
        """The loss scale and the good micro-batches since it last changed, for a checkpoint."""
        return {"loss_scale": self._scale, "good_steps": self._good_steps}

    def load(self, state: dict[str, float]) -> None:
        """Goes on from a `state`."""
        if self.dtype == torch.float16:
            self._scale, self._good_steps = state["loss_scale"], int(state["good_steps"])
