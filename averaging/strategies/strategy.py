"""What all strategies share: gathering gradients, keeping pace with the swarm, rounds, and the state of a newcomer."""

import logging
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import Condition
from time import monotonic, sleep

import torch
from torch import Tensor

from averaging.config import LOCAL_STEPPERS, Averaging
from averaging.records import AVERAGED, RoundEnd, StateLoad
from averaging.roster import group_of
from averaging.sketch import sketch
from averaging.transports.transport import Meeting, Outcome, Transport
from training.loop import Progress
from training.optimizers.build import initialise_state

LEAVE_SECONDS = 1.5  # that a leaver waits for a round that others may be counting on
NON_FINITE = "non-finite"  # why a contribution of this peer's own counts for nothing
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Round:
    """A meeting that has begun."""

    meeting: Meeting
    kind: str
    epoch: int


class Gathered:
    """Gradients of micro-batches: their mean over the samples. A gradient that is missing counts as zero."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params
        self._mean: list[Tensor] = []
        self.samples = 0

    @torch.no_grad()
    def add(self, samples: int) -> bool:
        """Takes the `.grad`s, means over `samples`; False: one was not finite, and all of them are dropped."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._params]
        for param in self._params:
            param.grad = None
        if not finite(grads):
            return False
        self.samples += samples
        if self._mean:
            torch._foreach_lerp_(self._mean, grads, samples / self.samples)
        else:
            self._mean = grads
        return True

    def take(self) -> list[Tensor]:
        """The mean, one tensor per parameter, zero if there were no samples; nothing of it stays here."""
        mean, self._mean, self.samples = self._mean or [torch.zeros_like(p) for p in self._params], [], 0
        return mean


class Strategy(ABC):
    """A `training.loop.Stepper` over a transport. One thread uses it, but for `hurry`.

    What a strategy is, it says by its hooks. All are called by the thread that steps, with `_lock` held, so that a
    newcomer never downloads a half-made change:
    - `_meet()`, at the end of an epoch: the swarm has its samples. Comes to `_next_epoch()`, or to `_start_gathering()`
      now and `_count_update()` later.
    - `_local_step()`, each time that this peer has gathered its share for one of `_local_steps()`, and at the end of an
      epoch if half a share is left, or none was whole; what is less is kept. It makes an update by default.
    - `_poll()`, once in every step, when the gradients have been gathered: to take up a result from the background.
    - `_round`: the epoch that samples are gathered for, where it is not that of the updates.
    - `settle()`: to wait for what is in the background; `_forget()`: to give it up, before a download.
    - `shared_state()`, `own_state()`: live tensors beyond parameters, buffers and the optimiser's statistics.

    With these in hand: `params`, all of them; `shared_params`, those that take part (not in a group whose
    `allow_data_parallelism` is False); `buffers`, floating point; `statistics()`; `_gathered`, the gradients since the
    last update; `_samples`, this epoch's so far; `_update(grads)`; `_group()`; `_begin(...)` and `_end(round)`.
    A micro-batch whose gradient is not finite is dropped, and counted as refused with the next round.
    `on_round` and `on_state_load` are called by the thread that steps, and must not block.
    """

    def __init__(self, *, config: Averaging, transport: Transport, optimizer: torch.optim.Optimizer,
                 shared_buffers: Iterable[Tensor] = (), on_round: Callable[[RoundEnd], None] = lambda _: None,
                 on_state_load: Callable[[StateLoad], None] = lambda _: None) -> None:
        self.config, self.transport, self.optimizer = config, transport, optimizer
        self.kind = AVERAGED[config.strategy]  # of rounds: what is averaged
        self.params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self.shared_params: list[Tensor] = [
            p for group in optimizer.param_groups if group.get("allow_data_parallelism", True) for p in group["params"]]
        self.buffers = [buffer for buffer in shared_buffers if buffer.is_floating_point()]
        self._on_round, self._on_state_load = on_round, on_state_load
        self._lock = Condition()  # around every change of what `read_state` reads
        self._gathered = Gathered(self.params)
        self._refused = Counter[str]()
        self._open: list[Round] = []
        self._epoch = self._samples = self._shares_stepped = 0
        self._share = math.inf
        self._may_lag = True  # nobody has averaged with this peer of late
        self._sketch: bytes | None = None  # of the parameters as the epoch began; None: not resumed yet
        if not optimizer.state:
            initialise_state(optimizer)

    # -- the Stepper --

    @property
    def epoch(self) -> int:
        """Updates of the whole swarm that this peer has made or downloaded."""
        return self._epoch

    @property
    def swarm_peers(self) -> int:
        """Peers that train, this one included, as far as is known."""
        return self.transport.standing().peers

    def resume(self, epoch: int) -> None:
        """Take up at `epoch`, parameters and all else having been loaded from a checkpoint; before the first step."""
        self._enter(epoch)
        self.transport.offer_state(self.read_state)

    def step(self, samples: int) -> Progress:
        """Add the micro-batch's gradients (its mean over `samples`); update when it is time, with whoever is there.

        Out of pace with the swarm, gradients are dropped and the swarm's state is downloaded instead.
        """
        if self._sketch is None:
            self.resume(self._epoch)
        before = self._epoch
        self._gather(samples)
        with self._lock:
            self._poll()
        swarm_samples = self.transport.standing().samples
        if self._is_behind():
            self._catch_up()
            before = self._epoch
        else:
            with self._lock:
                self._proceed()
        return self._progress(before, swarm_samples)

    def synchronise(self) -> None:
        """Take the state of the first member; in a fixed world, where all call it at once, before the first step."""
        members = self.transport.members(self._epoch)
        values = [value for value in self._state().values() if value.is_floating_point()]
        weight = float(self.transport.peer_id == members[0])
        if len(members) > 1:
            self._end(self._begin(values, weight, kind="initial", group=members))
        self._enter(self._epoch)

    def settle(self) -> None:  # noqa: B027 - most have nothing in the background
        """Wait for what runs in the background, and apply it."""

    def hurry(self) -> None:
        """From any thread: give up the rounds that are under way, so that `step` returns."""
        for round in tuple(self._open):
            round.meeting.cancel()

    def close(self) -> None:
        """Finish what is under way or give it up, and take leave."""
        deadline = monotonic() + LEAVE_SECONDS
        for round in tuple(self._open):
            while not round.meeting.done() and monotonic() < deadline:
                sleep(0.01)
            round.meeting.cancel()
        self.transport.close()

    # -- hooks --

    @abstractmethod
    def _meet(self) -> None:
        """The swarm has gathered the samples that end the epoch `_round`."""

    def _local_step(self) -> None:
        """This peer has gathered its share for one local step."""
        self._update(self._gathered.take())

    def _poll(self) -> None:  # noqa: B027 - likewise
        """A micro-batch's gradients are among those gathered; nothing has been made of them yet."""

    @property
    def _round(self) -> int:
        """The epoch that this peer gathers samples for."""
        return self._epoch

    def _local_steps(self) -> int:
        """That a peer of average speed makes in the epoch that begins. 1: with all that it gathers; 0: none."""
        return self.config.local_steps if self.config.strategy in LOCAL_STEPPERS else 0

    def shared_state(self) -> dict[str, Tensor]:
        """Live tensors of the strategy that a newcomer downloads and a checkpoint holds."""
        return {}

    def own_state(self) -> dict[str, Tensor]:
        """Live tensors of the strategy that only this peer's checkpoint holds."""
        return {}

    # -- what hooks build on --

    def statistics(self) -> list[Tensor]:
        """The optimiser's, of shared parameters and of their shape: momentum and the like; step counters are none."""
        return [value for p in self.shared_params for name, value in sorted(self.optimizer.state[p].items())
                if isinstance(value, Tensor) and value.shape == p.shape and name != "step"]

    def _update(self, grads: Sequence[Tensor]) -> None:
        """One step of the optimiser with `grads`, one per parameter."""
        with self._lock:
            for param, grad in zip(self.params, grads, strict=True):
                param.grad = grad
            self.optimizer.step()
            for param in self.params:
                param.grad = None

    def _group(self) -> tuple[str, ...]:
        """With whom this peer averages at the end of epoch `_round`, itself included, sorted."""
        return group_of(self.transport.peer_id, self.transport.members(self._round),
                        key=f"{self.kind}/{self._round}", target_group_size=self.config.target_group_size)

    def _begin(self, tensors: Sequence[Tensor], weight: float, *, group: Sequence[str], kind: str = "",
               epoch: int | None = None, compression: str = "none", buffers: Sequence[Tensor] = (),
               state: Sequence[Tensor] = (), fingerprint: bytes = b"", samples: int = 0) -> Round:
        """Start to average `tensors` with `group`; by default at the end of epoch `_round`, and of the strategy's kind.

        `samples` are those of this peer that are in `tensors` and in no other round's: it is credited with them. With
        a value that is not finite, the weight is 0: this peer's contribution is dropped, and counted.
        """
        epoch, kind = self._round if epoch is None else epoch, kind or self.kind
        if weight and not finite([*tensors, *buffers, *state]):
            weight = 0.0
            self._refused[NON_FINITE] += 1
        round = Round(self.transport.meet(
            tensors, weight, kind=kind, epoch=epoch, group=group, compression=compression,
            buffers=buffers, state=state, fingerprint=fingerprint, state_compression=self.config.state_compression,
            samples=samples if weight else 0), kind, epoch)
        self._open.append(round)
        return round

    def _end(self, round: Round) -> Outcome:
        """Wait for the round's end, which writes the mean where it was averaged, and report it."""
        with self._lock:
            outcome = round.meeting.result()
        self._open.remove(round)
        self._may_lag = not outcome.averaged
        if not outcome.averaged:
            log.warning("epoch %d: averaging of %s failed: %s", round.epoch, round.kind, outcome.reason)
        self._report_round(round.kind, round.epoch, "averaged" if outcome.averaged else "failed", outcome)
        return outcome

    def _alone(self) -> None:
        """Report that there was nobody to average with."""
        self._may_lag = True
        self._report_round(self.kind, self._round, "alone", Outcome(averaged=False))

    def _next_epoch(self) -> None:
        """The update that ends the epoch has been made, and the next epoch begins."""
        self._count_update()
        self._start_gathering()

    def _count_update(self) -> None:
        self._epoch += 1
        self._sketch = sketch(self.shared_params)

    def _start_gathering(self) -> None:
        """From now on, samples count towards epoch `_round`."""
        self._samples = self._shares_stepped = 0
        self._tell()
        steps, peers = self._local_steps(), max(1, self.swarm_peers)
        self._share = self.config.target_batch_size / (steps * peers) if steps > 1 else math.inf

    # -- the course of a step --

    def _gather(self, samples: int) -> None:
        if self._gathered.add(samples):
            self._samples += samples
        else:
            self._refused[NON_FINITE] += 1
            log.warning("epoch %d: a gradient is not finite: the micro-batch is dropped", self._epoch)
        self._tell()

    def _proceed(self) -> None:
        shares = int(self._samples / self._share + 1e-6)
        if shares > self._shares_stepped:
            self._shares_stepped = shares
            self._local_step()
        if not self.transport.is_due(self._round):
            return
        rest = self._gathered.samples
        if self._local_steps() and rest and (rest >= self._share / 2 or not self._shares_stepped):
            self._local_step()
        self._meet()

    def _enter(self, epoch: int) -> None:
        self._epoch, self._sketch = epoch, sketch(self.shared_params)
        self._start_gathering()

    def _tell(self) -> None:
        self.transport.report(self._round, self._samples, self._sketch or b"")

    def _progress(self, epoch_before: int, swarm_samples: int | None = None) -> Progress:
        standing = self.transport.standing()
        updated = self._epoch > epoch_before
        return Progress(self._epoch, self._samples, swarm_peers=standing.peers, updated=updated, swarm_samples=(
            swarm_samples if updated and swarm_samples is not None else standing.samples))

    def _report_round(self, kind: str, epoch: int, outcome: str, end: Outcome) -> None:
        refused, self._refused = self._refused + Counter(end.refused), Counter()
        self._on_round(RoundEnd(
            kind=kind, outcome=outcome, epoch=epoch, group_size=len(end.members) or 1, seconds=end.seconds,
            matchmaking_seconds=end.matchmaking_seconds, bytes_sent=end.bytes_sent,
            bytes_received=end.bytes_received, refused=dict(refused), reason=end.reason))

    # -- keeping pace --

    def _is_behind(self) -> bool:
        """Whether the swarm is too far on: further than is allowed, or as far if this peer is left out of rounds.

        It could lag for ever otherwise. Who is not left out may be behind another group, and awaited by its own. An
        archive that is further on than all who train counts likewise: the swarm was there once.
        """
        behind = self._furthest() - self._round
        return behind > self.config.max_allowed_epoch_difference - self._may_lag

    def _furthest(self) -> int:
        standing = self.transport.standing()
        return max(standing.epoch, standing.archived)

    def _catch_up(self) -> None:
        """Drop the gradients and try once to download the swarm's state; if nobody sends it, the next step tries."""
        started = monotonic()
        log.info("epoch %d: the swarm is at %d, downloading its state", self._epoch, self._furthest())
        self._forget()
        found = self.transport.fetch_state()
        succeeded = found is not None and self.load_state(found[1])
        self._may_lag = not succeeded
        self._tell()
        self._on_state_load(StateLoad(self._epoch, monotonic() - started, succeeded))

    def _forget(self) -> None:
        """Give up what is gathered and under way: it belongs to parameters that are about to be replaced."""
        self._gathered.take()
        self._samples = self._shares_stepped = 0
        self.hurry()
        for round in tuple(self._open):
            self._end(round)

    def _state(self) -> dict[str, Tensor]:
        """All that a newcomer needs, live but for the epoch."""
        state = {f"parameters.{index}": p.detach() for index, p in enumerate(self.shared_params)}
        state |= {f"buffers.{index}": buffer for index, buffer in enumerate(self.buffers)}
        state |= {f"statistics.{index}.{name}": value for index, p in enumerate(self.shared_params)
                  for name, value in sorted(self.optimizer.state[p].items()) if isinstance(value, Tensor)}
        state |= {f"strategy.{name}": value for name, value in self.shared_state().items()}
        return state | {"epoch": torch.tensor(self._epoch)}

    def read_state(self) -> dict[str, Tensor]:
        """A copy of the state, on the CPU; from any thread."""
        with self._lock:
            return {name: value.detach().to("cpu", copy=True) for name, value in self._state().items()}

    def refusal(self, state: Mapping[str, Tensor]) -> str:
        """Why `load_state` would not take this one; empty if it would."""
        return _misfit(state, self._state()) or ("it is older" if state["epoch"] < self._epoch else "")

    def load_state(self, state: Mapping[str, Tensor]) -> bool:
        """Take over a downloaded state; False, and nothing is changed, where it is not one of ours, or an old one."""
        if reason := self.refusal(state):
            log.warning("a downloaded state is refused: %s", reason)
            return False
        with self._lock, torch.no_grad():
            for name, value in self._state().items():
                value.copy_(state[name])
            self._enter(int(state["epoch"]))
        return True

    def extra_state(self) -> dict[str, Tensor]:
        """The strategy's own tensors, live, for a checkpoint."""
        return self.shared_state() | self.own_state()

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from an `extra_state`. Raises ValueError, having changed nothing, where it does not fit."""
        ours = self.extra_state()
        if reason := _misfit(state, ours):
            raise ValueError(f"the strategy's state in the checkpoint does not fit: {reason}")
        with self._lock, torch.no_grad():
            for name, value in ours.items():
                value.copy_(state[name])


@torch.no_grad()
def finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all values are numbers, and so is their square; waits for the device once."""
    if not tensors:
        return True
    norms = torch._foreach_norm(list(tensors))
    return bool(torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite().all())


def _misfit(state: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> str:
    """Why `state` can't replace `ours`; empty if it can."""
    if state.keys() != ours.keys():
        return f"its tensors are others, {', '.join(sorted(state.keys() ^ ours.keys())[:3])} among them"
    for name, value in ours.items():
        if state[name].shape != value.shape or state[name].dtype != value.dtype:
            return f"{name} is {state[name].dtype} {list(state[name].shape)}, not {value.dtype} {list(value.shape)}"
    if not finite([value for value in state.values() if value.is_floating_point()]):
        return "it holds values that are not finite"
    return ""
