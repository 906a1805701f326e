"""The rival: hivemind.Optimizer as it comes, with the settings with which it was fastest on loopback.

Not the defaults: with those (matchmaking 15 s, groups whose size nobody says) epochs take 15 to 30 s. target_group_size
is handed to the gradient averager too, so that a full group starts without waiting. With two peers, matchmaking_time
0.3 and 0.5 s gave shorter ends of epochs than 1.0 and 1.5 s; `averaging_rounds --matchmaking` tries others.
"""

import averaging.fork  # noqa: F401

# isort: split
import os
from collections.abc import Callable, Iterable
from functools import partial
from time import monotonic
from typing import Any

import hivemind
import torch
from hivemind.averaging import DecentralizedAverager
from hivemind.averaging.control import StepControl
from hivemind.optim.grad_averager import GradientAverager

from averaging.dht import DHT
from averaging.process import die_with_parent
from averaging.records import RoundEnd, StateLoad
from training.loop import Progress

MATCHMAKING_SECONDS = 0.5
TIMEOUTS = {"averaging_timeout": 10.0, "next_chunk_timeout": 2.0, "load_state_timeout": 10.0}
TRACKER = {"min_refresh_period": 0.2, "default_refresh_period": 0.5, "max_refresh_period": 2.0}
_run = DecentralizedAverager.run


def _run_and_die_with_parent(averager: DecentralizedAverager) -> None:
    die_with_parent(averager._parent_pid)
    _run(averager)


DecentralizedAverager.run = _run_and_die_with_parent  # a stock averager outlives a bench that is killed


class StockHivemind(hivemind.Optimizer):  # type: ignore[misc]  # hivemind is untyped
    """hivemind.Optimizer as a `training.loop.Stepper`, which tells how its gradient rounds ended."""

    def __init__(self, *, dht: DHT, run_id: str, params: Iterable[torch.Tensor],
                 optimizer: Callable[[Any], torch.optim.Optimizer], target_batch_size: int, peers: int,
                 on_round: Callable[[RoundEnd], None], on_state_load: Callable[[StateLoad], None],
                 overlap: bool = False, matchmaking_time: float = MATCHMAKING_SECONDS, **options: Any) -> None:
        self._on_round, self._on_state_load = on_round, on_state_load
        groups = {"target_group_size": peers, "request_timeout": min(0.5, matchmaking_time)}
        super().__init__(
            dht=dht, run_id=run_id, params=list(params), optimizer=optimizer, target_batch_size=target_batch_size,
            offload_optimizer=overlap, delay_grad_averaging=overlap, delay_optimizer_step=overlap,
            matchmaking_time=matchmaking_time, grad_averager_factory=partial(GradientAverager, **groups),
            averager_opts=groups, tracker_opts=TRACKER, **TIMEOUTS, **options)

    @property
    def epoch(self) -> int:
        """Updates so far."""
        return int(self.local_epoch)

    @property
    def swarm_peers(self) -> int:
        """Peers in the swarm, as of the last reading."""
        return int(self.tracker.global_progress.num_peers)

    def step(self, samples: int) -> Progress:
        """Takes over the gradients of a micro-batch."""
        epoch = self.epoch
        super().step(batch_size=samples)
        self.zero_grad(set_to_none=True)
        return Progress(self.epoch, self.tracker.local_progress.samples_accumulated, swarm_peers=self.swarm_peers,
                        swarm_samples=self.tracker.global_progress.samples_accumulated, updated=self.epoch != epoch)

    def _begin_averaging_gradients(self, grad_scaler: None) -> bool:
        began = bool(super()._begin_averaging_gradients(grad_scaler))
        if not began:
            self._on_round(RoundEnd("gradients", "alone" if self.swarm_peers == 1 else "failed", self.epoch))
        return began

    def _average_gradients_and_load_into_optimizer(self, maybe_step_control: StepControl) -> None:
        started, epoch = monotonic(), self.epoch
        super()._average_gradients_and_load_into_optimizer(maybe_step_control)
        averaged = maybe_step_control.done() and not maybe_step_control.cancelled() and (
            maybe_step_control.exception() is None)
        self._on_round(RoundEnd("gradients", "averaged" if averaged else "failed", epoch, seconds=monotonic() - started,
                                group_size=len(maybe_step_control.result()) if averaged else 1))

    def load_state_from_peers(self, **kwargs: Any) -> None:
        """As hivemind's, and reported."""
        started, epoch = monotonic(), self.epoch
        super().load_state_from_peers(**kwargs)
        self._on_state_load(StateLoad(self.epoch, monotonic() - started, self.epoch > epoch))

    def close(self) -> None:
        """End the averagers; nothing is waited for."""
        self.tracker.shutdown(0.5)
        for averager in (self.state_averager, self.grad_averager):
            if averager.is_alive() and averager._parent_pid == os.getpid():
                averager.kill()
                averager.join()
