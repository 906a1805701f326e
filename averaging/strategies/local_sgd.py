"""Local SGD and post-local SGD: peers step on their own, and average parameters (Lin et al., arXiv 1808.07217).

An epoch is `target_batch_size` samples of the swarm. At its start each peer's share for one step is worked out,
target_batch_size / (local_steps x peers), and each steps whenever it has gathered as much; at its end parameters and
BatchNorm's statistics are averaged, and with `average_momentum` the optimisers' too, weighted by the epoch's samples.
Peers of one speed make exactly `local_steps` steps; a faster one makes more, and weighs more.

Each of the first `initial_steps` epochs is a single step, with all that a peer has gathered. By "multiple_processes"
all make it and average; by "single_process" the first of a group makes it, and the others copy its model.

Failure: a round that fails leaves each member with its own parameters, and the next one pulls them together. Alone,
there is nothing to average.
"""

from torch import Tensor

from averaging.strategies.local_sgd_schedule import turn
from averaging.strategies.strategy import Strategy


class LocalSGD(Strategy):
    """A `training.loop.Stepper`: an epoch is one averaging of parameters."""

    def _local_steps(self) -> int:
        return 1 if self._epoch < self.config.initial_steps else self.config.local_steps

    def _local_step(self) -> None:
        if self._is_the_first_ones() and self._group()[0] != self.transport.peer_id:
            self._gathered.take()
        else:
            super()._local_step()

    def _meet(self) -> None:
        group = self._group()
        if len(group) == 1:
            self._alone()
        else:
            weight = float(group[0] == self.transport.peer_id) if self._is_the_first_ones() else self._samples
            self._end(self._begin(self._averaged(), weight, group=group, buffers=self.buffers,
                                  compression=self.config.state_compression, samples=self._samples))
        self._next_epoch()

    def _averaged(self) -> list[Tensor]:
        return [*self.shared_params, *(self.statistics() if self.config.average_momentum else ())]

    def _is_the_first_ones(self) -> bool:
        """Whether only one process steps in this epoch."""
        config = self.config
        return turn(self._epoch, local_steps=config.local_steps, initial_steps=config.initial_steps,
                    initial_step_method=config.initial_step_method).alone
