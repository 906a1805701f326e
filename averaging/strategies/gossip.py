"""Gossip: decentralised SGD, in which each peer averages parameters with a few others at each step (Decent-DP).

x_i(t+1) = sum_j W_ij(t) x_j(t) - eta d(g_i at x_i(t)): peers mix while each works out its gradient at the parameters
that it had before (adapt while combine). An epoch is one such step, on `target_batch_size` samples of the swarm: g_i
is the mean gradient over those of them that are this peer's; d is the optimiser's direction, with statistics that
stay local, and W the plain mean within the groups of averaging/topology.py. The mixing begins as soon as an epoch's
update is made, and is waited for at the next one. In epoch 0, whose parameters are equal, nothing is mixed. A group
larger than `target_group_size` is cut into such groups, others at every step. As in Decent-DP parameters only are
mixed; BatchNorm's statistics stay local but for `global_average`.

Failure: a round that fails leaves its members with their own parameters for this step; so does being alone. A peer
without samples only mixes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from averaging import roster, topology
from averaging.strategies.strategy import Round, Strategy


@dataclass(frozen=True)
class _Mixing:
    """One that is under way."""

    round: Round
    values: list[Tensor]  # of the parameters; the group's mean once the round has averaged


class Gossip(Strategy):
    """A `training.loop.Stepper`: an epoch is one step, and one mixing of parameters with the topology's group.

    `d2c`: how far this peer's parameters were from the mean of all (Euclidean) at the last `global_average`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._mixing: _Mixing | None = None
        self._is_begun = True  # the mixing of this epoch, or there is to be none
        self._own: list[Tensor] = []  # parameters and buffers, while those of all are in their place
        self.d2c: float | None = None

    def metrics(self) -> dict[str, float]:
        """What there is to report beside the loss."""
        return {} if self.d2c is None else {"d2c": self.d2c}

    def resume(self, epoch: int) -> None:
        super().resume(epoch)
        self._is_begun = epoch == 0

    def _poll(self) -> None:
        assert not self._own, "revert_global_average() comes before the next step"
        if not self._is_begun:  # after a restart; the parameters are still those that the epoch began with
            self._begin_mixing(self._epoch - 1)

    def _meet(self) -> None:
        self.settle()
        samples = self._gathered.samples
        if samples:
            self._update(self._gathered.take())
        self._begin_mixing(self._round, samples)
        self._next_epoch()

    def settle(self) -> None:
        """Wait for the mixing that is under way, if any, and take its mean."""
        mixing, self._mixing = self._mixing, None
        if mixing:
            with self._lock, torch.no_grad():
                if self._end(mixing.round).averaged:
                    torch._foreach_copy_(self.shared_params, mixing.values)

    def _is_behind(self) -> bool:
        """Not by one epoch: who is in the next one may still wait for this peer, to mix at the end of this one."""
        ahead = self.transport.standing().epoch - self._round
        return ahead != 1 and super()._is_behind()

    def _forget(self) -> None:
        self._mixing, self._is_begun = None, True
        super()._forget()

    def _begin_mixing(self, step: int, samples: int = 0) -> None:
        """Of the parameters after the update that ended epoch `step`, by so many samples of this peer's."""
        self._is_begun, group = True, self._group_at(step)
        if len(group) == 1:
            self._alone()
        else:
            values = [p.detach().clone() for p in self.shared_params]
            self._mixing = _Mixing(self._begin(
                values, 1.0, group=group, epoch=step, compression=self.config.state_compression,
                samples=samples), values)

    def _group_at(self, step: int) -> Sequence[str]:
        """Of the topology; a part of it, where it is too large."""
        me, limit = self.transport.peer_id, self.config.target_group_size
        machines = getattr(self.transport, "machines", None)
        found = topology.group_of(me, topology.groups(
            self.config.topology, self.transport.members(step), step, machines))
        return found if len(found) <= limit else roster.group_of(
            me, found, key=f"{self.kind}/{step}", target_group_size=limit)

    @torch.no_grad()
    def global_average(self, *, revert: bool = True) -> float | None:
        """Let parameters and buffers be the mean over all peers; how far this one's parameters were from it.

        All peers must call this between two steps, after the same epoch. With `revert` it is for evaluation or a
        checkpoint: `revert_global_average` comes before the next step. Otherwise all go on from the mean, and the
        mixing that is under way is dropped. None: it failed, and nothing has changed.
        """
        shared = [*self.shared_params, *self.buffers]
        means = [value.detach().clone() for value in shared]
        params = len(self.shared_params)
        members = self.transport.members(self._epoch)
        if len(members) > 1 and self._epoch and not self._end(self._begin(
                means[:params], 1.0, kind="global average", group=members, epoch=self._epoch - 1,
                compression=self.config.state_compression, buffers=means[params:])).averaged:
            return None
        with self._lock:
            if revert:
                self._own = [value.detach().clone() for value in shared]
            elif self._mixing:
                dropped, self._mixing = self._mixing, None
                self._end(dropped.round)
            apart = torch._foreach_sub(means[:params], self.shared_params)
            torch._foreach_copy_(shared, means)
        self.d2c = float(torch.stack([norm.double() for norm in torch._foreach_norm(apart)]).norm())
        return self.d2c

    @torch.no_grad()
    def revert_global_average(self) -> None:
        """Take back what `global_average` has done, if it has."""
        own, self._own = self._own, []
        if own:
            with self._lock:
                torch._foreach_copy_([*self.shared_params, *self.buffers], own)
