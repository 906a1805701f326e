"""The experiment's model, optimiser and strategy, on the CPU, without training: what states are checked against."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from threading import Lock
from time import time
from typing import Any

import safetensors.torch
from torch import Tensor

from averaging.experiment import canonical, fingerprint, parse
from averaging.sketch import sketch
from averaging.strategies.open import open_strategy
from averaging.transports.memory import MemorySwarm
from averaging.transports.swarm.state import STATE_HEADER, tensors_in
from averaging.transports.swarm.wire import Refused
from training.checkpoint import load_into, newest_checkpoint, read_checkpoint, write_checkpoint
from training.errors import BadInput
from training.objectives.objective import build_objective
from training.optimizers.build import build_optimizer, govern, initialise_state
from training.optimizers.schedule import learning_rate
from training.precision import INITIAL_STATE
from training.recipe import from_scratch

State = Mapping[str, Tensor]


class Held:
    """The newest state, as a peer has it; at first the one that the experiment begins with. Any thread may use it."""

    def __init__(self, document: bytes) -> None:
        """`document`: the experiment's, canonical."""
        experiment = parse(document)
        self._document, self._fingerprint, self._lock = canonical(experiment), fingerprint(document), Lock()
        self._objective = build_objective(from_scratch(experiment))
        self._optimizer = build_optimizer(experiment.optimizer, self._objective)
        initialise_state(self._optimizer)
        self._strategy = open_strategy(
            experiment.averaging, transport=MemorySwarm(1).join("archive"), optimizer=self._optimizer,
            shared_buffers=self._objective.shared_buffers())
        govern(self._optimizer, self._objective, partial(
            learning_rate, experiment.optimizer, batch_size=experiment.averaging.target_batch_size,
            images_per_pass=experiment.data.images_per_pass), epoch=lambda: self._strategy.epoch,
            grad_clip_norm=experiment.optimizer.grad_clip_norm)
        self._strategy.resume(0)
        self.most_bytes = STATE_HEADER + sum(tensor.nbytes for tensor in self._strategy.read_state().values())

    def check(self, data: bytes | memoryview, epoch: int) -> tuple[State, bytes]:
        """Tensors and sketch of a downloaded state of `epoch`. Raises Refused unless a peer would take it."""
        if (state := tensors_in(bytes(data))) is None:
            raise Refused("not a file of tensors")
        with self._lock:
            if refusal := self._strategy.refusal(state):
                raise Refused(refusal)
        if int(state["epoch"]) != epoch:
            raise Refused(f"of epoch {int(state['epoch'])}, where {epoch} was announced")
        count = sum(name.startswith("parameters.") for name in state)
        return state, sketch(state[f"parameters.{index}"] for index in range(count))

    def take(self, state: State) -> None:
        """Make a checked state the newest."""
        with self._lock:
            if not self._strategy.load_state(state):
                raise Refused("no state of this experiment")

    def copy(self) -> dict[str, Tensor]:
        """A copy of the newest state."""
        with self._lock:
            return self._strategy.read_state()

    def snapshot(self) -> tuple[int, bytes]:
        """The newest state's epoch, and the state as it travels."""
        state = self.copy()
        return int(state["epoch"]), safetensors.torch.save(state)

    def write(self, folder: Path, keep_last: int) -> Path:
        """Write the newest state as a checkpoint. Raises OSError, having left the earlier ones as they were."""
        with self._lock:
            return write_checkpoint(
                folder, epoch=self._strategy.epoch, experiment=self._document, fingerprint=self._fingerprint,
                objective=self._objective, optimizer=self._optimizer, strategy=self._strategy.extra_state(),
                keep_last=keep_last, progress={"precision": INITIAL_STATE, "time": time()})

    def restore(self, folder: Path) -> Path | None:
        """Take up the newest good checkpoint in `folder`; each one passed over is logged. None: there is none."""
        if (path := newest_checkpoint(folder)) is None:
            return None
        checkpoint = read_checkpoint(path)
        if checkpoint.fingerprint != self._fingerprint:
            raise BadInput(f"{path} is of experiment {checkpoint.fingerprint[:12]}", expected=self._fingerprint[:12],
                           mend="Move it elsewhere.")
        with self._lock:
            load_into(checkpoint, self._objective, self._optimizer)
            self._strategy.load_extra_state(checkpoint.strategy)
            self._strategy.resume(checkpoint.epoch)
        return path


def described(path: Path) -> dict[str, Any]:
    """What the JSON beside a checkpoint says of it."""
    meta: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    return meta
