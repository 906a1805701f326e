import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from training.checkpoint import (
    load_into,
    newest_checkpoint,
    parameters_checksum,
    read_checkpoint,
    write_checkpoint,
)
from training.errors import BadInput
from training.loop import LocalStepper
from training.objectives.objective import Objective, build_objective
from training.optimizers.build import build_optimizer, govern, initialise_state
from training.recipe import SwavTraining

Tiny = Callable[..., SwavTraining]
EXPERIMENT = '{"name":"tiny – näher"}'.encode()


class Run:
    """A training run whose batches depend on the epoch alone."""

    def __init__(self, training: SwavTraining, epoch: int = 0, batch_size: int = 4) -> None:
        self.objective = build_objective(training, batch_size=batch_size)
        self.optimizer = build_optimizer(training.optimizer, self.objective)
        self.stepper = LocalStepper(self.optimizer, target_batch_size=4, epoch=epoch)
        govern(self.optimizer, self.objective, lambda now: 0.1 / (1 + now), lambda: self.stepper.epoch)

    def update(self, times: int) -> None:
        for _ in range(times):
            generator = torch.Generator().manual_seed(self.stepper.epoch)
            views = [torch.randn(8, 3, side, side, generator=generator) for side in (16, 8)]
            self.objective(views, None, self.stepper.epoch)[0].backward()
            self.stepper.step(4)

    def write(self, directory: Path, epoch: int | None = None, keep_last: int = 3, **progress: object) -> Path:
        return write_checkpoint(
            directory, epoch=self.stepper.epoch if epoch is None else epoch, experiment=EXPERIMENT,
            fingerprint="f00d", objective=self.objective, optimizer=self.optimizer, keep_last=keep_last,
            progress=progress)

    def tensors(self) -> dict[str, Tensor]:
        state = self.optimizer.state_dict()["state"]
        return {**self.objective.state_dict(), **self.objective.local_state(),
                **{f"{i}.{name}": value for i, values in state.items() for name, value in values.items()}}


def assert_identical(left: Run, right: Run) -> None:
    ours, theirs = left.tensors(), right.tensors()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def complaint(path: Path) -> str:
    with pytest.raises(BadInput) as refused:
        read_checkpoint(path)
    assert str(path.with_suffix("")) in str(refused.value)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("optimiser", ["optimizer.name=sgd", "optimizer.use_larc=true", "optimizer.name=adamw",
                                       "optimizer.name=accum_adam"])
def test_resumed_run_equals_the_one_that_went_straight_on(tiny: Tiny, tmp_path: Path, optimiser: str) -> None:
    training = tiny(optimiser, "loss.freeze_prototypes_iters=1")
    straight, first = Run(training), Run(training)
    straight.update(4)
    first.update(2)
    checkpoint = read_checkpoint(first.write(tmp_path))
    resumed = Run(tiny(optimiser, "loss.freeze_prototypes_iters=1", "seed=1"), epoch=checkpoint.epoch)
    load_into(checkpoint, resumed.objective, resumed.optimizer)
    assert_identical(resumed, first)
    resumed.update(2)
    assert_identical(resumed, straight)


def test_queue_goes_on_where_it_was(tiny: Tiny, tmp_path: Path) -> None:
    training = tiny("loss.queue.queue_length=12")
    straight, first = Run(training), Run(training)
    straight.update(6)
    first.update(2)  # two of three places filled
    resumed = Run(training, epoch=2)
    load_into(read_checkpoint(first.write(tmp_path)), resumed.objective, resumed.optimizer)
    resumed.update(4)
    assert_identical(resumed, straight)
    assert any(name.startswith("queue.") for name in straight.tensors())


def test_queue_of_another_batch_size_starts_empty(tiny: Tiny, tmp_path: Path) -> None:
    training = tiny("loss.queue.queue_length=14")  # 12 of which suit batches of 4
    first, resumed = Run(training), Run(training, batch_size=7)
    first.update(3)
    load_into(read_checkpoint(first.write(tmp_path)), resumed.objective, resumed.optimizer)
    assert not any(tensor.any() for tensor in resumed.objective.local_state().values())
    assert parameters_checksum(resumed.objective) == parameters_checksum(first.objective)


def test_checkpoint_with_a_queue_serves_an_objective_without(tiny: Tiny, tmp_path: Path) -> None:
    first, judged = Run(tiny("loss.queue.queue_length=12")), build_objective(tiny())
    first.update(1)
    load_into(read_checkpoint(first.write(tmp_path)), judged)
    assert parameters_checksum(judged) == parameters_checksum(first.objective)


def test_progress_comes_back_as_it_was(tiny: Tiny, tmp_path: Path) -> None:
    path = Run(tiny()).write(tmp_path, key="train/0", batch=7, precision={"loss_scale": 65536.0})
    assert read_checkpoint(path).progress == {"key": "train/0", "batch": 7, "precision": {"loss_scale": 65536.0}}


def test_checkpoint_says_what_it_is_of(tiny: Tiny, tmp_path: Path) -> None:
    path = Run(tiny()).write(tmp_path, epoch=42)
    checkpoint = read_checkpoint(path)
    assert path.name == "epoch-00000042.safetensors"
    assert (checkpoint.epoch, checkpoint.experiment, checkpoint.fingerprint) == (42, EXPERIMENT, "f00d")
    meta = json.loads(path.with_suffix(".json").read_text())
    assert meta["torch"] == torch.__version__
    assert meta["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_objective_can_be_loaded_alone(tiny: Tiny, tmp_path: Path) -> None:
    trained, fresh = Run(tiny()), Run(tiny("seed=1"))
    trained.update(1)
    load_into(read_checkpoint(trained.write(tmp_path)), fresh.objective)
    assert parameters_checksum(fresh.objective) == parameters_checksum(trained.objective)
    assert not fresh.optimizer.state


def test_only_the_newest_are_kept(tiny: Tiny, tmp_path: Path) -> None:
    run = Run(tiny())
    for epoch in (1, 2, 3, 10):
        run.write(tmp_path, epoch=epoch, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "epoch-00000003.json", "epoch-00000003.safetensors", "epoch-00000010.json", "epoch-00000010.safetensors"]


def test_what_was_just_written_is_kept_even_beside_later_epochs(tiny: Tiny, tmp_path: Path) -> None:
    run = Run(tiny())
    run.write(tmp_path, epoch=10, keep_last=1)
    assert read_checkpoint(run.write(tmp_path, epoch=5, keep_last=1)).epoch == 5


def test_a_corrupt_later_checkpoint_takes_no_good_one_s_place(tiny: Tiny, tmp_path: Path) -> None:
    run = Run(tiny())
    for epoch in (40, 50):
        run.write(tmp_path, epoch=epoch, keep_last=2)
    (tmp_path / "epoch-00000050.safetensors").write_bytes(b"cut")
    run.write(tmp_path, epoch=41, keep_last=2)
    assert {path.stem for path in tmp_path.glob("*.json")} >= {"epoch-00000040", "epoch-00000041"}


def test_epoch_written_again_replaces_its_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    run = Run(tiny())
    run.write(tmp_path, epoch=1)
    run.update(1)
    fresh = Run(tiny("seed=1"))
    load_into(read_checkpoint(run.write(tmp_path, epoch=1)), fresh.objective, fresh.optimizer)
    assert_identical(fresh, run)


def test_no_checkpoint_is_found_where_there_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_truncated_checkpoint_is_refused_and_passed_over(
        tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tiny())
    good, bad = run.write(tmp_path, epoch=1), run.write(tmp_path, epoch=2)
    bad.write_bytes(bad.read_bytes()[:-1])
    assert "truncated or changed" in complaint(bad)
    assert newest_checkpoint(tmp_path) == good
    told = [record for record in caplog.records if record.name == "training.checkpoint"]
    assert [record.levelno for record in told] == [logging.WARNING]  # hivemind renames the levels
    assert bad.name in caplog.text


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"epoch": "1"}', '"text"', "\x00"])
def test_json_that_is_not_ours_is_refused(tiny: Tiny, tmp_path: Path, content: str) -> None:
    path = Run(tiny()).write(tmp_path)
    path.with_suffix(".json").write_text(content)
    assert "JSON" in complaint(path)
    assert newest_checkpoint(tmp_path) is None


def test_tensor_file_without_its_json_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    path = Run(tiny()).write(tmp_path)
    path.with_suffix(".json").unlink()
    assert "No such file" in complaint(path)


def test_file_that_holds_no_tensors_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    path = Run(tiny()).write(tmp_path)
    path.write_bytes(b"not tensors")
    meta = json.loads(path.with_suffix(".json").read_text())
    meta["sha256"] = hashlib.sha256(b"not tensors").hexdigest()
    path.with_suffix(".json").write_text(json.dumps(meta))
    assert "not a tensor file" in complaint(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_crash_while_writing_leaves_the_earlier_checkpoint(
        tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    run = Run(tiny())
    earlier = run.write(tmp_path, epoch=1)
    rename = Path.replace

    def crash(staged: Path, target: Path) -> Path:
        if target.suffix == suffix:
            raise OSError("the machine went down")
        return rename(staged, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", crash)
        with pytest.raises(OSError, match="went down"):
            run.write(tmp_path, epoch=2)
    assert newest_checkpoint(tmp_path) == earlier
    assert newest_checkpoint(run.write(tmp_path, epoch=3).parent).name == "epoch-00000003.safetensors"
    assert list(tmp_path.glob("*.tmp")) == []


def test_bytes_reach_the_disk_before_their_name_and_the_name_before_the_next_file(
        tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.replace

    def traced_fsync(descriptor: int) -> None:
        events.append(f"fsync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def traced_rename(staged: Path, target: Path) -> Path:
        events.append(f"rename {staged.name}")
        return rename(staged, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(Path, "replace", traced_rename)
    Run(tiny()).write(tmp_path, epoch=1)
    assert events == [
        "fsync epoch-00000001.safetensors.tmp", "rename epoch-00000001.safetensors.tmp", f"fsync {tmp_path.name}",
        "fsync epoch-00000001.json.tmp", "rename epoch-00000001.json.tmp", f"fsync {tmp_path.name}"]


def test_tensors_in_channels_last_are_written_too(tiny: Tiny, tmp_path: Path) -> None:
    run, fresh = Run(tiny()), Run(tiny("seed=1"))
    run.objective.to(memory_format=torch.channels_last)
    run.update(1)
    load_into(read_checkpoint(run.write(tmp_path)), fresh.objective, fresh.optimizer)
    assert_identical(fresh, run)


@pytest.mark.parametrize("other", ["model.head.dims=[0, 16, 9]", "model.head.num_clusters=[6, 6]",
                                   "model.head.use_bn=false"])
def test_checkpoint_of_another_model_is_refused_and_changes_nothing(tiny: Tiny, tmp_path: Path, other: str) -> None:
    checkpoint = read_checkpoint(Run(tiny(other)).write(tmp_path))
    run = Run(tiny())
    run.update(1)
    before = {name: tensor.clone() for name, tensor in run.tensors().items()}
    with pytest.raises(BadInput, match=r"in the checkpoint: .*; expected .* as in this experiment") as refused:
        load_into(checkpoint, run.objective, run.optimizer)
    assert "\n" not in str(refused.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.tensors().items())


def test_state_of_another_optimiser_is_refused_and_changes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    trained = Run(tiny("optimizer.name=adamw"))
    trained.update(1)
    run = Run(tiny())
    initialise_state(run.optimizer)
    before = parameters_checksum(run.objective)
    with pytest.raises(BadInput, match="exp_avg"):
        load_into(read_checkpoint(trained.write(tmp_path)), run.objective, run.optimizer)
    assert parameters_checksum(run.objective) == before


def test_checksum_tells_parameters_apart_and_overlooks_buffers_and_layout(tiny: Tiny) -> None:
    def objective() -> Objective:
        return build_objective(tiny())

    checksum = parameters_checksum(objective())
    assert parameters_checksum(objective()) == checksum
    assert parameters_checksum(objective().to(memory_format=torch.channels_last)) == checksum

    other_buffers, other_weight = objective(), objective()
    other_buffers.backbone.bn1.running_mean.add_(1)
    assert parameters_checksum(other_buffers) == checksum
    with torch.no_grad():
        other_weight.backbone.layer4[1].bn2.bias[0] = 1e-20
    assert parameters_checksum(other_weight) != checksum

    one_name, another = (nn.ParameterDict({name: torch.ones(2)}) for name in ("a", "b"))
    assert parameters_checksum(one_name) != parameters_checksum(another)
