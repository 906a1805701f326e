"""Checkpoints: tensors in safetensors, the rest in JSON beside them; nothing in them is ever executed.

`epoch-00000042.safetensors` is complete once `epoch-00000042.json`, which holds its SHA-256, stands beside it.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.atomic import move_into_place
from training.errors import BadInput
from training.objectives.objective import Objective
from training.optimizers.build import initial_state

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What a run was at the end of `epoch`."""

    epoch: int                   # collaborative epochs, that is updates, so far
    experiment: bytes            # canonical JSON
    fingerprint: str             # of the experiment
    tensors: dict[str, Tensor]   # objective.<name>, optimizer.<index of the parameter>.<name>, local.<name> (the
                                 # queue), strategy.<name>
    progress: dict[str, Any]     # where the run stood, for whoever wrote it: the next batch, samples so far, ...

    @property
    def strategy(self) -> dict[str, Tensor]:
        """Tensors of the averaging strategy."""
        return _under("strategy.", self.tensors)


def write_checkpoint(directory: Path, *, epoch: int, experiment: bytes, fingerprint: str, objective: Objective,
                     optimizer: torch.optim.Optimizer, keep_last: int, progress: Mapping[str, Any] | None = None,
                     strategy: Mapping[str, Tensor] | None = None) -> Path:
    """Writes a checkpoint and removes all but the newest `keep_last`; the path of its tensor file.

    `progress` must be what JSON can hold; `strategy`: tensors of the averaging strategy. Atomic: a crash at any moment
    leaves the earlier checkpoints, and this one whole or not at all. Raises OSError where the disk is full or the like,
    having left nothing half-written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"epoch-{epoch:08d}.safetensors"
    meta = {"epoch": epoch, "fingerprint": fingerprint, "progress": dict(progress or {}),
            "experiment": experiment.decode(), "torch": torch.__version__}
    try:
        _write(path, _state(objective, optimizer, strategy or {}), meta)
    except BaseException:
        for staged in directory.glob(f"{path.stem}.*.tmp"):
            staged.unlink(missing_ok=True)
        if not path.with_suffix(".json").exists():
            path.unlink(missing_ok=True)
        raise
    _prune(directory, keep_last, path)
    return path


def _write(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    staged = path.with_suffix(".safetensors.tmp")
    try:
        save_file(dict(tensors), staged)
    except SafetensorError as error:  # its word for a full disk
        raise OSError(f"{path}: {error}") from None
    digest = _sha256(staged)
    move_into_place(staged, path)
    staged = path.with_suffix(".json.tmp")
    staged.write_text(json.dumps({**meta, "sha256": digest}, indent=1))
    move_into_place(staged, path.with_suffix(".json"))


def newest_checkpoint(directory: Path, *, up_to: int | None = None) -> Path | None:
    """The newest checkpoint in `directory` that is whole; each one passed over is logged with the reason.

    `up_to`: the last epoch that counts.
    """
    last = "~" if up_to is None else f"epoch-{up_to:08d}.safetensors"
    for path in sorted((path for path in directory.glob("epoch-*.safetensors") if path.name <= last), reverse=True):
        try:
            _verified(path)
        except BadInput as error:
            log.warning("checkpoint passed over: %s", error)
        else:
            return path
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads the checkpoint of the tensor file `path`, on the CPU. Raises BadInput if it is truncated or foreign."""
    meta = _verified(path)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise _bad(path, f"not a tensor file: {error}") from None
    return Checkpoint(meta["epoch"], meta["experiment"].encode(), meta["fingerprint"], tensors, meta["progress"])


def load_into(checkpoint: Checkpoint, objective: Objective, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Makes `objective` what it was, and to train on, `optimizer` and the queue; options such as lr stay as they are.

    Raises BadInput, having changed nothing, where their tensors differ in name or shape.
    """
    state = _under("objective.", checkpoint.tensors)
    _require_equal_shapes(state, objective.state_dict())
    if optimizer is not None:
        _load_optimizer(optimizer, _under("optimizer.", checkpoint.tensors))
        objective.load_local_state(_under("local.", checkpoint.tensors))
    objective.load_state_dict(state)


def parameters_checksum(module: nn.Module) -> str:
    """SHA-256 over the bytes of all parameters, in the order of their names; buffers do not count."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _state(objective: Objective, optimizer: torch.optim.Optimizer, strategy: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {f"objective.{name}": tensor for name, tensor in objective.state_dict().items()}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in _flat(optimizer.state_dict()).items()}
    tensors |= {f"local.{name}": tensor for name, tensor in objective.local_state().items()}
    tensors |= {f"strategy.{name}": tensor for name, tensor in strategy.items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _flat(optimizer_state: Mapping[str, Any]) -> dict[str, Tensor]:
    """State tensors of an optimiser's state dict, as <index of the parameter>.<name>."""
    return {f"{index}.{name}": value for index, state in optimizer_state["state"].items()
            for name, value in state.items() if isinstance(value, Tensor)}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """A parameter that had no state yet gets the initial one, which is equivalent."""
    complete = initial_state(optimizer)
    initial = _flat(complete)
    _require_equal_shapes(tensors, {name: initial.get(name) for name in tensors})
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        complete["state"][int(index)][name] = tensor
    optimizer.load_state_dict(complete)


def _require_equal_shapes(found: Mapping[str, Tensor], expected: Mapping[str, Tensor | None]) -> None:
    for name in sorted(found.keys() | expected.keys()):
        there, here = found.get(name), expected.get(name)
        if there is None or here is None or there.shape != here.shape:
            raise BadInput(f"{name} in the checkpoint: {_shape(there)}", expected=f"{_shape(here)}, as in this "
                           "experiment", mend="The checkpoint belongs to another one.")


def _shape(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"shape {list(tensor.shape)}"


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _verified(path: Path) -> dict[str, Any]:
    """The JSON beside `path`, once it is known to describe just these bytes."""
    try:
        meta = json.loads(path.with_suffix(".json").read_text())
        kinds = {"epoch": int, "fingerprint": str, "progress": dict, "experiment": str, "sha256": str}
        if not (isinstance(meta, dict) and all(isinstance(meta.get(key), kind) for key, kind in kinds.items())):
            raise _bad(path, "the JSON beside it is not covey's")
        if _sha256(path) != meta["sha256"]:
            raise _bad(path, "its bytes are not those that were written: truncated or changed")
    except OSError as error:
        raise _bad(path, f"{error.strerror}: {error.filename}") from None
    except ValueError as error:
        raise _bad(path, f"the JSON beside it does not parse: {error}") from None
    return meta


def _bad(path: Path, reason: str) -> BadInput:
    return BadInput(f"{path}: {reason}", expected="a checkpoint of covey, with its .json beside it",
                    mend="Use another one, or an earlier one.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _prune(directory: Path, keep_last: int, written: Path) -> None:
    """Removes what is older than the newest `keep_last` up to `written`, and what a crash left half-written."""
    others = sorted(path for path in directory.glob("epoch-*.safetensors") if path < written)
    for path in others[:max(0, len(others) - (keep_last - 1))]:
        path.with_suffix(".json").unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    for staged in directory.glob("epoch-*.tmp"):
        staged.unlink(missing_ok=True)
