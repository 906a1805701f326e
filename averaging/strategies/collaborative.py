"""Collaborative SGD: peers gather one large batch, average its gradients, step together (DeDLOC, arXiv 2106.10207).

With equal initial state, N peers end an epoch with the weights of one process that accumulated the same micro-batches,
up to float order. One round per epoch averages gradients and BatchNorm's statistics, weighted by samples; and every
`average_state_every` epochs, if members differ, parameters and the optimiser's statistics, before the update.

Failure: a round that fails leaves each member with its own gradients, and the next averaging of state pulls the
parameters together; where none is due at once, whoever differs from the majority downloads its state. Alone, there is
nothing to average. A peer that has no samples, and gets none, makes the update with a gradient of zero.

With `overlap`, a round runs while the next epoch's gradients gather, still at the old parameters, and its update is
made in the first step after its end, at the latest before the next round begins: with a micro-batch per epoch,
x(t+1) = x(t) - lr g(x(t-1)).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from averaging.strategies.strategy import Round, Strategy


@dataclass(frozen=True)
class _Update:
    """One that is on its way."""

    round: Round
    grads: list[Tensor]           # of all parameters; once the round has averaged, the mean in those that are shared
    buffers: list[Tensor]         # likewise
    buffers_before: list[Tensor]  # as the round began; empty where nobody changes them meanwhile


class Collaborative(Strategy):
    """A `training.loop.Stepper`: an epoch is one update of the whole swarm."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        shared = set(map(id, self.shared_params))
        self._is_shared = [id(p) in shared for p in self.params]
        self._on_its_way: _Update | None = None
        self._lacking = torch.tensor(0)  # updates that the state which others download does not have yet

    def shared_state(self) -> dict[str, Tensor]:
        return {"lacking": self._lacking}

    def resume(self, epoch: int) -> None:
        self._lacking.zero_()  # what was on its way when the checkpoint was written is lost
        super().resume(epoch)

    @property
    def _round(self) -> int:
        return self._epoch + (self._on_its_way is not None)

    def _poll(self) -> None:
        if self._on_its_way and self._on_its_way.round.meeting.done():
            self.settle()

    def settle(self) -> None:
        """Wait for the update that is on its way, and make it."""
        if self._on_its_way:
            with self._lock:
                update, self._on_its_way = self._on_its_way, None
                self._finish(update)
                self._count_update()
                self._lacking.zero_()
                self._tell()

    def _meet(self) -> None:
        self.settle()
        group = self._group()
        if len(group) == 1:
            self._alone()
            self._update(self._gathered.take())
            self._next_epoch()
        elif self.config.overlap:
            self._on_its_way = self._start(group)
            self._lacking.fill_(1)
            self._start_gathering()
        else:
            self._finish(self._start(group))
            self._next_epoch()

    def _start(self, group: tuple[str, ...]) -> _Update:
        weight, grads = self._gathered.samples, self._gathered.take()
        # the next epoch's forward passes go on to change BatchNorm's statistics
        before = [buffer.clone() for buffer in self.buffers] if self.config.overlap else []
        buffers = [buffer.clone() for buffer in before] if self.config.overlap else self.buffers
        shared = [grad for grad, is_shared in zip(grads, self._is_shared, strict=True) if is_shared]
        round = self._begin(
            shared, weight, group=group, compression=self.config.compression, buffers=buffers,
            state=[*self.shared_params, *self.statistics()] if self._averages_state() else (),
            fingerprint=self._sketch or b"", samples=weight)
        return _Update(round, grads, buffers, before)

    @torch.no_grad()
    def _finish(self, update: _Update) -> None:
        if self._end(update.round).averaged and update.buffers_before:
            since = torch._foreach_sub(self.buffers, update.buffers_before)  # 0 leaves the mean to the bit
            torch._foreach_copy_(self.buffers, list(torch._foreach_add(update.buffers, since)))
        self._update(update.grads)

    def _averages_state(self) -> bool:
        return self._epoch % self.config.average_state_every == 0

    def _is_behind(self) -> bool:
        """Also: all others are equal, this peer is not, and nothing else will mend it at the end of this epoch."""
        standing = self.transport.standing()
        one_group = standing.peers <= self.config.target_group_size
        return super()._is_behind() or (standing.minority and one_group and not self._averages_state())

    def _tell(self) -> None:
        # while an update is on its way, some of those in this epoch have made it and some have not
        self.transport.report(self._round, self._samples, b"" if self._on_its_way else self._sketch or b"")

    def _forget(self) -> None:
        self._on_its_way = None
        super()._forget()

    def load_state(self, state: Any) -> bool:
        """Also makes the update that is on its way at the sender, though without its gradient, to be in pace."""
        loaded = super().load_state(state)
        if loaded and self._lacking:
            with self._lock:
                self._update([torch.zeros_like(p) for p in self.params])
                self._lacking.zero_()
                self._next_epoch()
        return loaded
