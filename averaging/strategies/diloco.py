"""DiLoCo: what many local steps came to is averaged, and an outer optimiser makes it one step (arXiv 2311.08105).

An epoch is `target_batch_size` samples of the swarm, in which each peer makes local steps as local_sgd does. At its
end each peer's delta = anchor - local, the outer gradient, is averaged, weighted by samples, and SGD with `outer_lr`,
`outer_momentum` and `outer_nesterov` moves the anchor, which all peers have in common:
b <- outer_momentum b + delta; anchor <- anchor - outer_lr b, or with Nesterov, - outer_lr (delta + outer_momentum b).
Then local <- (1 - alpha) local + alpha anchor. BatchNorm's statistics are averaged as they are, every epoch.

Of several `fragments` (arXiv 2501.18512) one is averaged in each epoch, in turn, so each after local_steps x fragments
steps. Tensors are dealt out in the optimiser's order, each to the fragment that is smallest so far: in strides, where
they are of one size. With `delay`, local steps go on while a fragment is averaged, and it is applied after so many,
at the latest at the end of the next epoch.

Uncompressed, parameters travel and delta is taken of their mean, which is the same, and with outer_lr 1, no momentum
and one fragment local SGD to the bit. Otherwise deltas travel, and with 8 bits error feedback: what a delta loses in
being encoded is added to the fragment's next one. Anchors that differ (a peer missed a round, groups) show in their
fingerprints, and are then averaged in the same round, with the outer momentum.

Failure: a round that fails leaves anchor, outer momentum and parameters as they are; the next delta of that fragment
has the lost one in it. So has what a checkpoint finds under way. Alone, the outer step is made with the own delta.
A newcomer downloads anchors and outer momentum, and starts from the anchors; so does a peer whose parameters are not
finite.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from averaging.compression import roundtrip
from averaging.sketch import sketch
from averaging.strategies.strategy import NON_FINITE, Round, Strategy, finite
from training.errors import BadInput

WITH_FEEDBACK = "blockwise8bit"  # wherever a transport cuts, this one sends what `roundtrip` made unchanged
log = logging.getLogger(__name__)


@dataclass
class _Flight:
    """A fragment that is being averaged."""

    fragment: Sequence[int]          # of `shared_params`
    round: Round | None              # None: alone
    values: list[Tensor]             # parameters or deltas; the mean of all peers' once the round has averaged
    losses: Sequence[Tensor]         # of the deltas, once they have arrived as they were encoded; empty: unknown
    buffers: list[Tensor]            # likewise
    steps: int = 0                   # local ones since it left


class DiLoCo(Strategy):
    """A `training.loop.Stepper`: an epoch is one outer step of one fragment. Raises BadInput at its start."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        config = self.config
        if config.fragments > len(self.shared_params):
            raise BadInput(f"averaging.fragments = {config.fragments}", expected=f"at most {len(self.shared_params)}, "
                           "the parameter tensors of the model", mend="Choose fewer.")
        self._fragments = dealt_out([p.numel() for p in self.shared_params], config.fragments)
        self._anchors = [p.detach().clone() for p in self.shared_params]
        self._momenta = _zeros(self._anchors) if config.outer_momentum else []
        self._residuals = _zeros(self._anchors) if config.compression == WITH_FEEDBACK else []
        self._is_anchored = torch.tensor(0)  # 0: not begun, so parameters that are loaded will be the anchors
        self._flight: _Flight | None = None

    # -- state --

    def shared_state(self) -> dict[str, Tensor]:
        return {f"outer_momentum.{index}": momentum for index, momentum in enumerate(self._momenta)}

    def own_state(self) -> dict[str, Tensor]:
        return {"is_anchored": self._is_anchored} | {
            f"{name}.{index}": value for name, values in (("anchor", self._anchors), ("residual", self._residuals))
            for index, value in enumerate(values)}

    def resume(self, epoch: int) -> None:
        self._drop_anchors()
        super().resume(epoch)

    def synchronise(self) -> None:
        self._drop_anchors()
        super().synchronise()
        self._return_to_anchors()

    def _state(self) -> dict[str, Tensor]:
        """Others get the anchors, which all have in common, for parameters."""
        return super()._state() | {f"parameters.{index}": anchor for index, anchor in enumerate(self._anchors)}

    def load_state(self, state: Mapping[str, Tensor]) -> bool:
        with self._lock:
            loaded = super().load_state(state)
            if loaded:
                self._return_to_anchors()
        return loaded

    @torch.no_grad()
    def _drop_anchors(self) -> None:
        """Begins at the parameters, unless a checkpoint had anchors."""
        if not self._is_anchored:
            torch._foreach_copy_(self._anchors, self.shared_params)
        self._is_anchored.fill_(1)

    @torch.no_grad()
    def _return_to_anchors(self) -> None:
        torch._foreach_copy_(self.shared_params, self._anchors)
        for residual in self._residuals:
            residual.zero_()
        self._enter(self._epoch)

    # -- the course of an epoch --

    def _local_step(self) -> None:
        super()._local_step()
        if self._flight:
            self._flight.steps += 1
            if self._flight.steps >= self.config.delay:
                self.settle()

    def _meet(self) -> None:
        self.settle()
        self._flight = self._depart(self._fragments[self._round % len(self._fragments)])
        if not self.config.delay:
            self.settle()
        self._next_epoch()

    def settle(self) -> None:
        """Wait for the fragment that is under way, if any, and apply it."""
        flight, self._flight = self._flight, None
        if flight:
            with self._lock:
                if flight.round is None or self._end(flight.round).averaged:
                    self._outer_step(flight)
                    if flight.buffers:
                        torch._foreach_copy_(self.buffers, flight.buffers)

    def _is_behind(self) -> bool:
        """With a delay not by one epoch: who is in the next one may still wait for this peer's part of the average."""
        ahead = self.transport.standing().epoch - self._round
        return not (self.config.delay and ahead == 1) and super()._is_behind()

    def _forget(self) -> None:
        self._flight = None
        super()._forget()

    @torch.no_grad()
    def _depart(self, fragment: Sequence[int]) -> _Flight:
        config, group, weight = self.config, self._group(), float(self._samples)
        if not finite(self.shared_params):
            log.warning("epoch %d: parameters are not finite: back to the anchors", self._round)
            torch._foreach_copy_(self.shared_params, self._anchors)
            weight = 0.0
            self._refused[NON_FINITE] += 1
        values = self._values(fragment)
        if len(group) == 1:
            self._alone()
            return _Flight(fragment, None, values, _zeros(values), [])
        losses: list[Tensor] = []
        if self._residuals and weight:
            values, losses = _as_encoded(values, config.compression)
        buffers = [buffer.clone() for buffer in self.buffers]
        state = [*_at(self._anchors, fragment), *_at(self._momenta, fragment)]
        round = self._begin(
            values, weight, group=group, buffers=buffers, state=state, fingerprint=sketch(state),
            compression=config.state_compression if self._sends_parameters else config.compression,
            samples=self._samples)
        return _Flight(fragment, round, values, losses, buffers)

    def _values(self, fragment: Sequence[int]) -> list[Tensor]:
        """What this peer has to send of a fragment."""
        params, anchors = _at(self.shared_params, fragment), _at(self._anchors, fragment)
        if self._sends_parameters:
            return [p.detach().clone() for p in params]
        deltas = list(torch._foreach_sub(anchors, params))
        if self._residuals:
            torch._foreach_add_(deltas, _at(self._residuals, fragment))
        return deltas

    @property
    def _sends_parameters(self) -> bool:
        return self.config.compression == "none"

    @torch.no_grad()
    def _outer_step(self, flight: _Flight) -> None:
        config = self.config
        anchors, momenta = _at(self._anchors, flight.fragment), _at(self._momenta, flight.fragment)
        means = flight.values if self._sends_parameters else list(torch._foreach_sub(anchors, flight.values))
        deltas = torch._foreach_sub(anchors, means)
        torch._foreach_lerp_(anchors, means, config.outer_lr)  # - outer_lr delta: with 1 it is the mean, to the bit
        ahead = -config.outer_lr * config.outer_momentum
        if momenta and not config.outer_nesterov:
            torch._foreach_add_(anchors, momenta, alpha=ahead)
        if momenta:
            torch._foreach_mul_(momenta, config.outer_momentum)
            torch._foreach_add_(momenta, deltas)
        if momenta and config.outer_nesterov:
            torch._foreach_add_(anchors, momenta, alpha=ahead)
        torch._foreach_lerp_(_at(self.shared_params, flight.fragment), anchors, config.alpha)
        if self._residuals and flight.losses:
            torch._foreach_copy_(_at(self._residuals, flight.fragment), list(flight.losses))


def dealt_out(sizes: Sequence[int], fragments: int) -> list[list[int]]:
    """Indices of `sizes`, in order, each put into the fragment that is smallest so far, or the first of those."""
    dealt: list[list[int]] = [[] for _ in range(fragments)]
    totals = [0] * fragments
    for index, size in enumerate(sizes):
        smallest = totals.index(min(totals))
        dealt[smallest].append(index)
        totals[smallest] += size
    return dealt


def _as_encoded(values: Sequence[Tensor], codec: str) -> tuple[list[Tensor], list[Tensor]]:
    """What arrives of `values`, as views of one vector, and what is lost on the way."""
    flat = torch.cat([value.flatten().to("cpu", torch.float32) for value in values])
    arrived = torch.split(roundtrip(codec, flat, flat.numel()), [value.numel() for value in values])
    sent = [part.view_as(value).to(value) for part, value in zip(arrived, values, strict=True)]
    return sent, list(torch._foreach_sub(list(values), sent))


def _at(tensors: Sequence[Tensor], indices: Sequence[int]) -> list[Tensor]:
    """Those of `tensors`, if there are any."""
    return [tensors[index] for index in indices] if tensors else []


def _zeros(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(tensor) for tensor in tensors]
