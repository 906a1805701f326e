"""A run without a swarm, by one process or by several that keep step, with all that a checkpoint of it holds."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from averaging.experiment import Experiment, canonical, fingerprint
from averaging.robust import centered_clip
from averaging.strategies.gossip import Gossip
from averaging.strategies.open import open_strategy
from averaging.strategies.strategy import Strategy
from averaging.transports.world import World
from peer.run_config import RunConfig
from peer.world import Crew
from training.checkpoint import Checkpoint, load_into, newest_checkpoint, read_checkpoint, write_checkpoint
from training.errors import BadInput
from training.loop import LocalStepper, Progress, Stepper, StepReport
from training.objectives.objective import build_objective
from training.optimizers.build import build_optimizer, govern, initialise_state
from training.optimizers.schedule import learning_rate, total_updates
from training.precision import Precision
from training.rewind import Rewind
from training.tuning import FORMATS, lay_out


class LoneRun:
    """Model, optimiser and place in the data of `covey train`; `resume` it before use, also where it is new.

    With one seed, device, batch size and number of processes, a run that was cut short and resumed any number of times
    makes the updates of one that went straight on; on a CPU, bit for bit. With another batch size or number of
    processes it goes on about where it was.

    Of n processes, that of rank r takes the batches r, r + n, ... of one order: n processes see, micro-batch by
    micro-batch, what one would see in n. BatchNorm's statistics are averaged as the strategy says; SwAV's assignments
    and queue are shared by all processes where their parameters are equal, in the strategy "collaborative". Rank 0
    writes the checkpoint; where processes have something of their own to keep, each writes one beside it.
    What is under way in the background (averaging.overlap, averaging.delay) is no part of a checkpoint.
    """

    def __init__(self, experiment: Experiment, config: RunConfig, device: torch.device, crew: Crew) -> None:
        self.experiment, self.config, self.device, self.crew = experiment, config, device, crew
        averaging = experiment.averaging
        self.is_in_step = averaging.strategy == "collaborative"  # all have the same parameters
        self.sharing = crew.size if self.is_in_step else 1  # processes that share assignments
        self.objective = build_objective(experiment, batch_size=config.batch_size, output_dir=config.run_dir,
                                         group=crew.group if self.is_in_step else None).to(device)
        self.precision = Precision(experiment.model.amp, device, self.objective.parameters(), all_agree=crew.all)
        self.optimizer = build_optimizer(experiment.optimizer, self.objective)
        self.key = f"train/{experiment.seed}"  # of the order of images, crops, views and whatever else is drawn
        self.batch = self.samples = 0  # batches and images, of all processes, that have gone into updates
        self.resumed_from: Path | None = None
        self._written: tuple[int, Path] | None = None  # the last checkpoint, and its epoch
        self._is_united = False
        self.exact = True  # whether the run was resumed with the batch size and the processes that it had
        self._update_size = {"batch_size": averaging.target_batch_size,
                             "images_per_pass": experiment.data.images_per_pass}
        self._end = total_updates(experiment.optimizer, **self._update_size)
        self.last_epoch = config.stop_at_epoch or self._end
        self._is_plain = crew.size == 1 and self.is_in_step
        self._keeps_its_own = not self.is_in_step or (crew.size > 1 and bool(self.objective.local_state()))
        self._folder = config.checkpoints / f"process-{crew.rank:04d}" if crew.rank else config.checkpoints

    @property
    def epoch(self) -> int:
        """Updates so far."""
        return self.stepper.epoch

    @property
    def stops_anywhere(self) -> bool:
        """Whether the run can end between two updates, and go back to the last one."""
        return self.is_in_step and not self.experiment.averaging.overlap

    def resume(self) -> None:
        """Take up the newest checkpoint that all processes have whole, if there is one.

        Raises BadInput if it is of another experiment.
        """
        checkpoint, progress = self._restore()
        self._lay_out(progress)
        epoch = progress.get("epoch", 0)
        self.strategy = None if self._is_plain else self._open_strategy(epoch, checkpoint)
        self.stepper: Stepper = InStep(self.strategy) if self.strategy else LocalStepper(
            self.optimizer, self.experiment.averaging.target_batch_size, epoch)
        govern(self.optimizer, self.objective, partial(learning_rate, self.experiment.optimizer, **self._update_size),
               lambda: self.stepper.epoch, self.experiment.optimizer.grad_clip_norm)
        self._rewind = Rewind(self.objective, self.precision)
        self._first_batch, self.first_samples = self.batch, self.samples
        self.reseed()

    def updated(self, report: StepReport) -> None:
        """An update has been made; to be called before anything else happens."""
        self.batch = self._first_batch + report.local_step * self.crew.size
        self.samples = self.first_samples + (report.samples_total - self.first_samples) * self.crew.size
        self._rewind.mark()

    def reseed(self) -> None:
        """Dropout and the like draw what they would have drawn without a checkpoint between the updates."""
        torch.manual_seed(int.from_bytes(sha256(f"{self.key}/{self.batch + self.crew.rank}".encode()).digest()[:7]))

    def checkpoint(self) -> Path:
        """Write what the run was after its last update, and go back there; of rank 0, the path."""
        self._rewind.rewind()
        if self._written and self._written[0] == self.epoch:
            return self._written[1]
        path = self.config.checkpoints
        if self.crew.rank == 0 or self._keeps_its_own:
            document = canonical(self.experiment)
            path = write_checkpoint(
                self._folder, epoch=self.epoch, experiment=document, fingerprint=fingerprint(document),
                objective=self.objective, optimizer=self.optimizer, keep_last=self.config.keep_last_checkpoints,
                strategy=self.strategy.extra_state() if self.strategy else None, progress=self._progress())
        self._written = self.epoch, path
        return path

    @contextmanager
    def united(self) -> Iterator[dict[str, float]]:
        """While inside, processes that mix by gossip all have the mean of their models; metrics of how it is made."""
        if not isinstance(self.strategy, Gossip):
            yield {}
            return
        if not self._is_united:
            self.strategy.global_average(revert=True)
        yield self.strategy.metrics()
        self.strategy.revert_global_average()

    def unite(self) -> None:
        """What `united` does, for good, once the schedule has ended."""
        if isinstance(self.strategy, Gossip) and self.epoch == self._end:
            self.strategy.global_average(revert=False)
            self._is_united = True

    def _progress(self) -> dict[str, Any]:
        several = {"processes": self.crew.size} if self.crew.size > 1 else {}
        return {"key": self.key, "batch": self.batch, "batch_size": self.config.batch_size,
                "samples_total": self.samples, "precision": self.precision.state(),
                "device": self.device.type, "memory_format": self.memory_format, **several}

    def _restore(self) -> tuple[Checkpoint | None, dict[str, Any]]:
        """Loads a checkpoint, and makes all processes' alike, but for what they have of their own."""
        path, self._is_everybodys = self._find()
        checkpoint = self._read(path) if path else None
        progress: dict[str, Any] = {}
        if checkpoint:
            load_into(checkpoint, self.objective, self.optimizer)
            progress = {**checkpoint.progress, "epoch": checkpoint.epoch}
        if self._is_everybodys:
            progress = json.loads(self.crew.text_from_first(json.dumps(progress)))
            if progress and not checkpoint:
                initialise_state(self.optimizer)
            self.crew.copy_from_first(self._tensors(with_statistics=bool(progress)))
        if progress:
            self.resumed_from = path
            self.precision.load(progress["precision"])
            self.batch = progress["batch"] * progress["batch_size"] // self.config.batch_size
            self.samples = progress["samples_total"]
            processes = progress.get("processes", 1)
            self.exact = (progress["batch_size"], processes) == (self.config.batch_size, self.crew.size)
            if path or not self._keeps_its_own:
                self._written = progress["epoch"], path or self.config.checkpoints
        return checkpoint, progress

    def _find(self) -> tuple[Path | None, bool]:
        """The checkpoint to go on from, if any, and whether rank 0's is for all; otherwise each has one of its own."""
        newest = newest_checkpoint(self._folder) if self.crew.rank == 0 or self._keeps_its_own else None
        if not self._keeps_its_own:
            return newest, True
        mine = newest
        while not self.crew.all((agreed := self.crew.least(_epoch(mine))) == _epoch(mine)):
            mine = newest_checkpoint(self._folder, up_to=agreed)
        fits = mine is not None and read_checkpoint(mine).progress.get("processes", 1) == self.crew.size
        if self.crew.all(fits):
            return mine, False
        return (newest if self.crew.rank == 0 else None), True

    def _tensors(self, *, with_statistics: bool) -> list[Tensor]:
        statistics = [value for group in self.optimizer.param_groups for parameter in group["params"]
                      for _, value in sorted(self.optimizer.state[parameter].items()) if isinstance(value, Tensor)]
        return [*self.objective.state_dict().values(), *(statistics if with_statistics else ())]

    def _open_strategy(self, epoch: int, checkpoint: Checkpoint | None) -> Strategy:
        averaging = self.experiment.averaging
        robust = partial(centered_clip, clip_radius=averaging.clip_radius)
        world = World(averaging.target_batch_size, reduce=robust if averaging.robust == "centered_clip" else None)
        everyone = averaging.model_copy(update={"target_group_size": max(2, self.crew.size)})
        strategy = open_strategy(everyone, transport=world, optimizer=self.optimizer,
                                 shared_buffers=self.objective.shared_buffers())
        if checkpoint and checkpoint.strategy:
            strategy.load_extra_state(checkpoint.strategy)
        if self._is_everybodys:
            self.crew.copy_from_first(strategy.extra_state().values())
        strategy.resume(epoch)
        return strategy

    def _read(self, path: Path) -> Checkpoint:
        checkpoint, expected = read_checkpoint(path), fingerprint(canonical(self.experiment))
        if checkpoint.epoch > self.last_epoch:
            raise BadInput(f"a run that is at epoch {checkpoint.epoch}", expected=f"at most {self.last_epoch}, where "
                           "it is to stop", mend="Raise --stop-at-epoch, or choose another with --run-dir.")
        if checkpoint.fingerprint != expected:
            raise BadInput(f"{path} is of experiment {checkpoint.fingerprint[:12]}", expected=f"{expected[:12]}, as "
                           "the recipe and its overrides make it", mend="Choose another with --run-dir.")
        if checkpoint.progress.get("key") != self.key:
            raise BadInput(f"{path} is of a peer of a swarm", expected="one that `covey train` wrote",
                           mend="Choose another with --run-dir.")
        return checkpoint

    def _lay_out(self, progress: dict[str, Any]) -> None:
        """As before, where the run was on such a device: another memory format would round otherwise."""
        wanted: str = self.config.memory_format
        if wanted == "auto" and progress.get("device") == self.device.type:
            wanted = progress["memory_format"]
        sizes = self.experiment.data.transforms.size_crops
        self.memory_format = lay_out(self.objective, wanted, sizes, self.device, self.precision)
        chosen = list(FORMATS)[self.crew.from_first(list(FORMATS).index(self.memory_format))]
        if chosen != self.memory_format:  # each has measured
            self.memory_format = lay_out(self.objective, chosen, sizes, self.device, self.precision)
        if self.config.compile:
            self.objective.backbone.compile()


class InStep:
    """A strategy as a `Stepper` whose world is told of every micro-batch, whatever becomes of its gradients."""

    def __init__(self, strategy: Strategy) -> None:
        assert isinstance(strategy.transport, World)
        self._strategy, self._world = strategy, strategy.transport

    @property
    def epoch(self) -> int:
        """The strategy's."""
        return self._strategy.epoch

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The strategy's."""
        return self._strategy.optimizer

    def step(self, samples: int) -> Progress:
        """See `training.loop.Stepper`."""
        self._world.saw(samples)
        return self._strategy.step(samples)


def _epoch(path: Path | None) -> int:
    return -1 if path is None else int(path.stem.removeprefix("epoch-"))
