"""Back to the last update: where a run that ends between two updates can be taken up exactly."""

import torch

from training.objectives.objective import Objective
from training.precision import Precision


class Rewind:
    """Remembers what micro-batches change before the update that they count towards: buffers, queue, loss scale.

    `mark` it after every update, and once before the first.
    """

    def __init__(self, objective: Objective, precision: Precision) -> None:
        self._objective, self._precision = objective, precision
        self.mark()

    def mark(self) -> None:
        """Now is what `rewind` goes back to."""
        self._buffers = [buffer.clone() for buffer in self._objective.buffers()]
        self._local = {name: tensor.clone() for name, tensor in self._objective.local_state().items()}
        self._scale = self._precision.state()

    @torch.no_grad()
    def rewind(self) -> None:
        """Objective and precision are what they were at the mark; gradients are not."""
        for buffer, marked in zip(self._objective.buffers(), self._buffers, strict=True):
            buffer.copy_(marked)
        self._objective.load_local_state(self._local)
        self._precision.load(self._scale)
