"""A run that one process makes alone, with all that a checkpoint of it holds."""

from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from averaging.experiment import Experiment, canonical, fingerprint
from peer.run_config import RunConfig
from training.checkpoint import Checkpoint, load_into, newest_checkpoint, read_checkpoint, write_checkpoint
from training.errors import BadInput
from training.loop import LocalStepper, StepReport
from training.objectives.objective import build_objective
from training.optimizers.build import build_optimizer, govern
from training.optimizers.schedule import learning_rate, total_updates
from training.precision import Precision
from training.rewind import Rewind
from training.tuning import lay_out


class LoneRun:
    """Model, optimiser and place in the data of `covey train`; `resume` it before use, also where it is new.

    With one seed, device and batch size, a run that was cut short and resumed any number of times makes the updates
    of one that went straight on; on a CPU, bit for bit. With another batch size it goes on about where it was.
    """

    def __init__(self, experiment: Experiment, config: RunConfig, device: torch.device) -> None:
        self.experiment, self.config, self.device = experiment, config, device
        self.objective = build_objective(experiment, batch_size=config.batch_size,
                                         output_dir=config.run_dir).to(device)
        self.precision = Precision(experiment.model.amp, device, self.objective.parameters())
        self.optimizer = build_optimizer(experiment.optimizer, self.objective)
        self.key = f"train/{experiment.seed}"  # of the order of images, crops, views and whatever else is drawn
        self.batch = self.samples = 0  # batches and images that have gone into updates
        self.resumed_from: Path | None = None
        self._written: tuple[int, Path] | None = None  # the last checkpoint, and its epoch
        self.exact = True  # whether the run was resumed with the batch size that it had
        self._update_size = {"batch_size": experiment.averaging.target_batch_size,
                             "images_per_pass": experiment.data.images_per_pass}
        self.last_epoch = config.stop_at_epoch or total_updates(experiment.optimizer, **self._update_size)

    @property
    def epoch(self) -> int:
        """Updates so far."""
        return self.stepper.epoch

    def resume(self) -> None:
        """Take up the newest whole checkpoint, if there is one. Raises BadInput if it is of another experiment."""
        path, epoch, progress = newest_checkpoint(self.config.checkpoints), 0, dict[str, Any]()
        if path is not None:
            checkpoint = self._read(path)
            load_into(checkpoint, self.objective, self.optimizer)
            self.resumed_from, epoch, progress = path, checkpoint.epoch, checkpoint.progress
            self._written = epoch, path
            self.precision.load(progress["precision"])
            self.batch = progress["batch"] * progress["batch_size"] // self.config.batch_size
            self.samples = progress["samples_total"]
            self.exact = progress["batch_size"] == self.config.batch_size
        self._lay_out(progress)
        self.stepper = LocalStepper(self.optimizer, self.experiment.averaging.target_batch_size, epoch)
        govern(self.optimizer, self.objective, partial(learning_rate, self.experiment.optimizer, **self._update_size),
               lambda: self.stepper.epoch, self.experiment.optimizer.grad_clip_norm)
        self._rewind = Rewind(self.objective, self.precision)
        self._first_batch = self.batch
        self.reseed()

    def updated(self, report: StepReport) -> None:
        """An update has been made; to be called before anything else happens."""
        self.batch, self.samples = self._first_batch + report.local_step, report.samples_total
        self._rewind.mark()

    def reseed(self) -> None:
        """Dropout and the like draw what they would have drawn without a checkpoint between the updates."""
        torch.manual_seed(int.from_bytes(sha256(f"{self.key}/{self.batch}".encode()).digest()[:7]))

    def checkpoint(self) -> Path:
        """Write what the run was after its last update, and go back there."""
        self._rewind.rewind()
        if self._written and self._written[0] == self.epoch:
            return self._written[1]
        document = canonical(self.experiment)
        path = write_checkpoint(
            self.config.checkpoints, epoch=self.epoch, experiment=document, fingerprint=fingerprint(document),
            objective=self.objective, optimizer=self.optimizer, keep_last=self.config.keep_last_checkpoints,
            progress={"key": self.key, "batch": self.batch, "batch_size": self.config.batch_size,
                      "samples_total": self.samples, "precision": self.precision.state(),
                      "device": self.device.type, "memory_format": self.memory_format})
        self._written = self.epoch, path
        return path

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
        self.memory_format = lay_out(self.objective, wanted, self.experiment.data.transforms.size_crops, self.device,
                                     self.precision)
        if self.config.compile:
            self.objective.backbone.compile()
