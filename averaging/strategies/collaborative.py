"""Collaborative SGD: peers gather one large batch, average its gradients, step together (DeDLOC, arXiv 2106.10207).

With equal initial state, N peers end an epoch with the weights of one process that accumulated the same micro-batches,
up to float order. Composed of hivemind.Optimizer. Failure: a gradient round that fails leaves every member that saw it
fail with its own gradients, and the next state round pulls the parameters together; alone, there is nothing to average.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any

import hivemind
import torch
from hivemind.averaging.control import AveragingStage, StepControl
from hivemind.optim.progress_tracker import LocalTrainingProgress, ProgressTracker
from hivemind.utils.crypto import RSAPrivateKey

from averaging.config import Averaging
from averaging.dht import DHT
from averaging.transports.swarm import GradAverager, Round, StateAverager
from training.loop import Progress

LEAVE_SECONDS = 1.5  # how long a leaver waits for a round that others may be counting on
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StateLoad:
    """How one download of the swarm's state ended."""

    epoch: int  # where this peer is now
    seconds: float
    succeeded: bool


class Collaborative:
    """A `training.loop.Stepper` over the swarm.

    `optimizer` makes the torch optimiser, state initialised (`initialise_state`), over the `parameters` or groups of
    them that it is given.
    `shared_buffers` are averaged and downloaded with the parameters: BatchNorm's running statistics, mostly.
    The two callbacks are called from this process's threads and must not block.
    """

    def __init__(self, *, dht: DHT, run_id: str, key: RSAPrivateKey, config: Averaging,
                 parameters: Iterable[Any], optimizer: Callable[[Any], torch.optim.Optimizer],
                 shared_buffers: Iterable[torch.Tensor] = (), client_mode: bool = False,
                 on_round: Callable[[Round], None] = lambda _: None,
                 on_state_load: Callable[[StateLoad], None] = lambda _: None) -> None:
        self._swarm = _SwarmOptimizer(
            dht=dht, run_id=run_id, params=list(parameters), optimizer=optimizer, offload_optimizer=False,
            extra_tensors=[buffer for buffer in shared_buffers if buffer.is_floating_point()], client_mode=client_mode,
            on_round=on_round, on_state_load=on_state_load, target_batch_size=config.target_batch_size,
            max_allowed_epoch_difference=config.max_allowed_epoch_difference,
            average_state_every=config.average_state_every, matchmaking_time=config.matchmaking_time,
            averaging_timeout=config.averaging_timeout, next_chunk_timeout=config.next_chunk_timeout,
            load_state_timeout=config.load_state_timeout,
            # stock hands target_group_size to the state averager alone
            grad_averager_factory=partial(GradAverager, target_group_size=config.target_group_size,
                                          request_timeout=config.request_timeout, allow_state_sharing=False),
            averager_opts={"target_group_size": config.target_group_size, "request_timeout": config.request_timeout,
                           "initialize_optimizer": False},
            tracker_opts={"min_refresh_period": config.min_refresh_period, "private_key": key,
                          "default_refresh_period": config.default_refresh_period,
                          "max_refresh_period": config.max_refresh_period,
                          "metadata_expiration": config.report_progress_expiration})

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimiser that steps."""
        optimizer: torch.optim.Optimizer = self._swarm.state_averager.optimizer
        return optimizer

    @property
    def epoch(self) -> int:
        """The collaborative epoch that this peer is in."""
        return int(self._swarm.local_epoch)

    @property
    def swarm_peers(self) -> int:
        """Peers that train in the swarm, this one included, as of the last reading."""
        return int(self._swarm.tracker.global_progress.num_peers)

    @property
    def is_alive(self) -> bool:
        """Whether both averager processes live."""
        return bool(self._swarm.state_averager.is_alive() and self._swarm.grad_averager.is_alive())

    def resume(self, epoch: int) -> None:
        """Take up at `epoch`, parameters and optimiser having been loaded from a checkpoint; before the first step."""
        self._swarm.state_averager.local_epoch = epoch
        self._swarm.state_averager.state_sharing_priority = epoch
        self._swarm.tracker.report_local_progress(epoch, samples_accumulated=0)

    def step(self, samples: int) -> Progress:
        """Add the micro-batch's gradients (its mean over `samples`); average and update when the swarm has enough.

        Out of step with the swarm, the gradients are dropped and the swarm's state is downloaded instead.
        """
        tracker, epoch = self._swarm.tracker, self.epoch
        before = tracker.global_progress.samples_accumulated
        self._swarm.step(batch_size=samples)
        self._swarm.zero_grad(set_to_none=True)
        updated = self.epoch != epoch
        gathered = before + samples if updated else tracker.global_progress.samples_accumulated
        return Progress(epoch=self.epoch, samples_accumulated=tracker.local_progress.samples_accumulated,
                        swarm_samples=gathered, swarm_peers=tracker.global_progress.num_peers, updated=updated)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """While inside, no time passes for the samples per second that the swarm is told of: nothing is trained."""
        with self._swarm.tracker.performance_ema.pause():
            yield

    def settle(self) -> None:
        """Wait for the state averaging that runs in the background, and apply it."""
        self._swarm.state_averager.step(wait_for_delayed_updates=True)

    def hurry(self) -> None:
        """From another thread: give up the rounds that `step` waits for, if any, so that it returns."""
        for control in (self._swarm.scheduled_grads, self._swarm.state_averager.current_round):
            if control is not None and control.triggered and not control.done():
                control.cancel()

    def close(self) -> None:
        """Say goodbye, finish or give up what is under way, end the averagers; within about 4 s."""
        self._swarm.leave()


class _SwarmOptimizer(hivemind.Optimizer):  # type: ignore[misc]  # hivemind is untyped
    """hivemind.Optimizer with our averagers, and with an outcome for everything that it tries."""

    scheduled_grads: StepControl | None
    scheduled_state: StepControl | None
    _should_check_synchronization_on_update: bool

    def __init__(self, *, on_round: Callable[[Round], None], on_state_load: Callable[[StateLoad], None],
                 max_allowed_epoch_difference: int, **kwargs: Any) -> None:
        self._on_round, self._on_state_load = on_round, on_state_load
        self._max_allowed_epoch_difference = max_allowed_epoch_difference
        client_mode = kwargs.pop("client_mode")
        super().__init__(client_mode=client_mode, **kwargs)

    def _make_progress_tracker(self, target_batch_size: int, **kwargs: Any) -> "_PacedTracker":
        return _PacedTracker(dht=self.dht, prefix=self.run_id, target_batch_size=target_batch_size,
                             client_mode=self.client_mode, start=True, **kwargs)

    def _maybe_schedule_gradient_averaging(self) -> None:
        if self.tracker.global_progress.num_peers > 1:  # alone, stock looks for a group all the same
            super()._maybe_schedule_gradient_averaging()

    def _make_state_averager(self, **kwargs: Any) -> StateAverager:
        return StateAverager(
            dht=self.dht, prefix=f"{self.run_id}_state_averager", min_matchmaking_time=self.matchmaking_time,
            allreduce_timeout=self.allreduce_timeout, next_chunk_timeout=self.next_chunk_timeout,
            offload_optimizer=False, client_mode=self.client_mode, start=True, on_round=self._on_round, **kwargs)

    def _should_load_state_from_peers(self) -> bool:
        behind = self.tracker.global_epoch - self.local_epoch
        if self._should_check_synchronization_on_update and self.tracker.fetched_global_progress_this_epoch.is_set():
            self._should_check_synchronization_on_update = False  # once an epoch, sharply
            return bool(behind >= self._max_allowed_epoch_difference)
        return bool(behind > self._max_allowed_epoch_difference)

    def _begin_averaging_gradients(self, grad_scaler: None) -> bool:
        began = bool(super()._begin_averaging_gradients(grad_scaler))
        if not began:  # stock steps with whatever .grad holds unless the optimiser is off-loaded
            self._load_local_gradients_into_optimizer()
            outcome = "failed" if self.tracker.global_progress.num_peers > 1 else "alone"
            self._on_round(Round("gradients", outcome, 1, 0.0, self.local_epoch))
        return began

    def _average_gradients_and_load_into_optimizer(self, maybe_step_control: StepControl) -> None:
        started, size = monotonic(), 1
        try:
            size = len(maybe_step_control.result(self.averaging_timeout))
        except Exception as error:
            log.warning("epoch %d: going on with this peer's own gradients: %r", self.local_epoch, error)
            if not maybe_step_control.done():
                maybe_step_control.cancel()
        # a round that failed left the local mean in the averager's buffers; the accumulators are zero by now
        self._load_averaged_gradients_into_optimizer_()
        outcome = "averaged" if size > 1 else "failed"
        self._on_round(Round("gradients", outcome, size, monotonic() - started, self.local_epoch))

    def load_state_from_peers(self, **kwargs: Any) -> None:
        """Try once, within `load_state_timeout`, to download the newest state; the next step tries again."""
        started, epoch = monotonic(), self.local_epoch
        log.info("epoch %d: the swarm is at %d, downloading its state", self.local_epoch, self.tracker.global_epoch)
        self._drop_scheduled_round()
        self.state_averager.step(wait_for_delayed_updates=True)
        with self.tracker.pause_updates():
            try:
                self.state_averager.load_state_from_peers(timeout=self.load_state_timeout, **kwargs)
            except Exception as error:
                log.warning("no peer sent its state: %r", error)
            succeeded = self.local_epoch > epoch
            self.tracker.report_local_progress(self.local_epoch, samples_accumulated=0)
            self.grad_averager.reset_accumulated_grads_()
            if not self.client_mode:
                self.state_averager.state_sharing_priority = self.local_epoch
        self._on_state_load(StateLoad(self.local_epoch, monotonic() - started, succeeded))

    def _drop_scheduled_round(self) -> None:
        if self.scheduled_grads is not None and not self.scheduled_grads.done():
            self._tag_along_with_zero_weight(self.scheduled_grads)
        self.scheduled_grads = None

    def leave(self) -> None:
        """Say goodbye, finish or give up what is under way, end the averagers."""
        self.tracker.shutdown(LEAVE_SECONDS)
        for control in (self.scheduled_grads, self.scheduled_state):
            if control is not None and not control.done():
                self._leave_round(control)
        for averager in (self.state_averager, self.grad_averager):
            averager.kill_process()

    def _leave_round(self, control: StepControl) -> None:
        if control.stage == AveragingStage.LOOKING_FOR_GROUP:
            control.cancel()
            return
        self.averaging_timeout = LEAVE_SECONDS
        self._tag_along_with_zero_weight(control)  # groupmates count on us: a sudden absence would stall them


class _PacedTracker(ProgressTracker):  # type: ignore[misc]  # hivemind is untyped
    """hivemind.ProgressTracker that tells the DHT of its progress at most once per `min_refresh_period`.

    Stock stores a signed record after every micro-batch, which costs half a core on a fast one, while nobody reads
    oftener than that.
    """

    local_progress: LocalTrainingProgress

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._told = 0.0  # when the DHT was last told, by the monotonic clock
        super().__init__(*args, **kwargs)

    def report_local_progress(self, local_epoch: int, samples_accumulated: int,
                              update_global_samples: bool = True) -> None:
        extra = samples_accumulated - self.local_progress.samples_accumulated
        same_epoch = local_epoch == self.local_progress.epoch
        if update_global_samples and same_epoch and local_epoch == self.global_progress.epoch:
            self.global_progress.samples_accumulated += extra
        if extra > 0:
            self.performance_ema.update(task_size=extra)
        else:
            self.performance_ema.reset_timer()
        self.local_progress = self._get_local_progress(local_epoch, samples_accumulated)
        if not same_epoch or extra <= 0 or monotonic() - self._told >= self.min_refresh_period:
            self._told = monotonic()
            self.should_report_progress.set()
