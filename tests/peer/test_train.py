"""`covey train`: exact resumption through checkpoints, records, evaluation, signals, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.io import write_png

from averaging.experiment import Experiment, experiment_of
from coordinator.state_dir import open_state_dir
from peer.loggers.console import JsonLines
from peer.loggers.csv import read_rows
from peer.run_config import RunConfig
from peer.train import train_alone
from training.checkpoint import newest_checkpoint, read_checkpoint
from training.config import override
from training.errors import BadInput
from training.loop import NonFiniteLoss

ROOT = Path(__file__).parents[2]
SWAV = {
    "name": "tiny", "model": {"trunk": {"depth": 18, "width_multiplier": 0.0625, "stem": "3x3/2"},
                              "head": {"dims": [0, 16, 8], "num_clusters": [6]}},
    "loss": {"queue": {"queue_length": 16, "start_iter": 2}},
    "data": {"dataset": "synthetic", "image_size": 16, "synthetic": {"num_train": 64, "num_val": 32},
             "transforms": {"total_num_crops": 3, "num_crops": [2, 1], "size_crops": [16, 12],
                            "crop_scales": [[0.3, 1.0], [0.1, 0.3]]}},
    "optimizer": {"name": "sgd", "lr": 0.1, "use_larc": True, "warmup_epochs": 3, "max_epochs": 10},
    "evaluation": {"resize_size": 16, "crop_size": 16, "knn_k": 5},
    "averaging": {"target_batch_size": 24, "target_group_size": 2}}
CLASSIFICATION = {
    **SWAV, "objective": "classification", "model": {"trunk": {"name": "lenet"}}, "loss": {"label_smoothing": 0.1},
    "data": {**SWAV["data"], "image_size": 32, "num_classes": 16, "transforms": {
        "total_num_crops": 1, "num_crops": [1], "size_crops": [32], "crop_scales": [[0.3, 1.0]]}},
    "optimizer": {"name": "adamw", "lr": 0.01, "num_epochs": 4},
    "evaluation": {"resize_size": 32, "crop_size": 32}}
KINDS = {"swav": SWAV, "classification": CLASSIFICATION}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def tiny(kind: str = "swav", *overrides: str) -> Experiment:
    return experiment_of(override(KINDS[kind], overrides))


def train(run_dir: Path, experiment: Experiment | None = None, **options: Any) -> None:
    """Eight images per micro-batch, so that three make an update, and one format, as `auto` may choose another."""
    config = {"batch_size": 8, "device": "cpu", "memory_format": "contiguous", "threads": 1, **options}
    train_alone(experiment or tiny(), RunConfig(run_dir=run_dir, **config), as_json=True)


def state(run_dir: Path) -> dict[str, Tensor]:
    """Everything that the newest checkpoint holds."""
    path = newest_checkpoint(run_dir / "checkpoints")
    assert path
    return read_checkpoint(path).tensors


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def told(output: str, event: str) -> list[dict[str, Any]]:
    return [told for told in map(json.loads, output.splitlines()) if told["event"] == event]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_cut_in_two_equals_one_that_went_straight_on(tmp_path: Path, kind: str) -> None:
    experiment = tiny(kind)
    train(tmp_path / "straight", experiment, stop_at_epoch=10)
    train(tmp_path / "cut", experiment, stop_at_epoch=5)
    train(tmp_path / "cut", experiment, stop_at_epoch=10)
    assert_equal(state(tmp_path / "straight"), state(tmp_path / "cut"))
    prefixes = {name.partition(".")[0] for name in state(tmp_path / "cut")}
    assert prefixes == {"objective", "optimizer"} | ({"local"} if kind == "swav" else set())
    straight, cut = (read_rows(tmp_path / name / "metrics.csv") for name in ("straight", "cut"))
    same = straight[0].keys() - {"samples_per_second"}  # nor were both evaluated after the same epochs
    assert [[row[name] for name in same] for row in straight] == [[row[name] for name in same] for row in cut]


def test_dropout_draws_the_same_after_a_resumption(tmp_path: Path) -> None:
    experiment = tiny("classification", "model.trunk.name=torchvision:mobilenet_v3_small",
                      "data.synthetic.num_train=16", "averaging.target_batch_size=8")
    train(tmp_path / "straight", experiment, stop_at_epoch=2)
    for epoch in (1, 2):
        train(tmp_path / "cut", experiment, stop_at_epoch=epoch)
    assert_equal(state(tmp_path / "straight"), state(tmp_path / "cut"))


def test_evaluating_and_writing_checkpoints_change_nothing(tmp_path: Path) -> None:
    train(tmp_path / "plain", stop_at_epoch=6)
    train(tmp_path / "busy", stop_at_epoch=6, evaluate_every_epochs=2, checkpoint_every_epochs=1,
          keep_last_checkpoints=2)
    assert_equal(state(tmp_path / "plain"), state(tmp_path / "busy"))
    names = sorted(path.name for path in (tmp_path / "busy" / "checkpoints").glob("*.safetensors"))
    assert names == ["epoch-00000005.safetensors", "epoch-00000006.safetensors"]
    rows = read_rows(tmp_path / "busy" / "metrics.csv")
    assert [row["epoch"] for row in rows if "knn_accuracy" in row] == [2, 4, 6]


def test_a_truncated_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    train(tmp_path / "straight", stop_at_epoch=8)
    train(tmp_path / "cut", stop_at_epoch=6, checkpoint_every_epochs=4)
    newest = newest_checkpoint(tmp_path / "cut" / "checkpoints")
    assert newest.name == "epoch-00000006.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    train(tmp_path / "cut", stop_at_epoch=8)
    assert_equal(state(tmp_path / "straight"), state(tmp_path / "cut"))
    assert [row["epoch"] for row in read_rows(tmp_path / "cut" / "metrics.csv")] == list(range(1, 9))


def test_an_epoch_is_recorded_with_the_means_of_its_micro_batches(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, tiny("classification"))
    rows = read_rows(tmp_path / "metrics.csv")
    # four passes over 64 images of 24 an update, the last of them broken
    assert [(row["epoch"], row["samples_total"]) for row in rows] == [(n, 24 * n) for n in range(1, 12)]
    assert {"loss", "learning_rate", "samples_per_second", "train_top1_accuracy"} <= rows[0].keys()
    assert rows[0]["learning_rate"] == 0.01 > rows[-1]["learning_rate"] > 0
    [finished] = told(capsys.readouterr().out, "finished")
    for name in ("top1_accuracy", "top5_accuracy"):
        assert rows[-1][name] == pytest.approx(finished[name], rel=1e-9)
    assert finished["epoch"] == finished["epochs"] == 11


def test_a_run_that_has_ended_is_evaluated_and_left_as_it_is(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, stop_at_epoch=2)
    before, [first] = state(tmp_path), told(capsys.readouterr().out, "finished")
    train(tmp_path, stop_at_epoch=2)
    assert_equal(before, state(tmp_path))
    [again] = told(capsys.readouterr().out, "finished")
    assert again["knn_accuracy"] == first["knn_accuracy"]
    assert again["parameters_checksum"] == first["parameters_checksum"]


def test_another_batch_size_goes_on_about_where_the_run_was(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, stop_at_epoch=4)
    train(tmp_path, stop_at_epoch=5, batch_size=4)
    progress = json.loads((tmp_path / "checkpoints" / "epoch-00000005.json").read_text())["progress"]
    assert (progress["batch"], progress["samples_total"]) == (24 + 6, 5 * 24)
    [warning] = told(capsys.readouterr().out, "warning")
    assert "batch size" in warning["message"]


def test_images_without_classes_are_trained_on_and_not_evaluated(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "flat").mkdir()
    for number in range(20):
        pixels = torch.randint(256, (3, 20, 20), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        write_png(pixels, str(tmp_path / "flat" / f"{number}.png"))
    experiment = tiny("swav", "data.dataset=image_folder", "averaging.target_batch_size=8")
    train(tmp_path / "run", experiment, data=tmp_path / "flat", stop_at_epoch=1)
    assert "knn_accuracy" not in told(capsys.readouterr().out, "finished")[0]
    with pytest.raises(BadInput, match="without classes"):
        train(tmp_path / "other", experiment, data=tmp_path / "flat", evaluate_every_epochs=1)
    assert not (tmp_path / "other").exists()


def test_another_experiment_is_refused_and_nothing_changed(tmp_path: Path) -> None:
    train(tmp_path, stop_at_epoch=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"}
    with pytest.raises(BadInput, match=r"belongs to a run of tiny-.*--run-dir"):
        train(tmp_path, tiny("swav", "optimizer.lr=0.2"), stop_at_epoch=2)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(("options", "line"), [
    ({"log": ("csv", "comet")}, "logger 'comet'"), ({"batch_size": 65}, "batch size 65"),
    ({"device": "cuda:77"}, "--device cuda:77"), ({"data": Path("/somewhere")}, "makes its own images")])
def test_what_is_wrong_is_said_before_anything_is_written(tmp_path: Path, options: dict[str, Any], line: str) -> None:
    with pytest.raises(BadInput, match=line):
        train(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_further_on_is_not_taken_back(tmp_path: Path) -> None:
    train(tmp_path, stop_at_epoch=2)
    with pytest.raises(BadInput, match="at epoch 2; expected at most 1"):
        train(tmp_path, stop_at_epoch=1)


def test_classes_to_evaluate_on_that_are_not_trained_on_are_refused(tmp_path: Path) -> None:
    for split, name in (("train", "cat"), ("train", "dog"), ("val", "cat"), ("val", "emu")):
        for number in range(8):
            path = tmp_path / "data" / split / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(torch.full((3, 20, 20), number, dtype=torch.uint8), str(path))
    with pytest.raises(BadInput, match="emu"):
        train(tmp_path / "run", tiny("swav", "data.dataset=image_folder"), data=tmp_path / "data")
    assert not (tmp_path / "run").exists()


def test_half_of_torchruns_variables_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="WORLD_SIZE in the environment, and no RANK"):
        train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("strategy", ["local_sgd", "diloco"])
def test_local_steps_of_one_process_are_plain_training(tmp_path: Path, strategy: str) -> None:
    """An epoch of two steps is two epochs, but for the schedule, which counts epochs."""
    common = ["optimizer.lr_scheduler=constant", "optimizer.name=sgd"]
    outer = ["averaging.outer_lr=1", "averaging.outer_momentum=0", "averaging.outer_nesterov=false"]
    train(tmp_path / "plain", tiny("classification", *common, "averaging.target_batch_size=16"), stop_at_epoch=6)
    train(tmp_path / "local", tiny(
        "classification", *common, "averaging.target_batch_size=32", f"averaging.strategy={strategy}",
        "averaging.local_steps=2", *(outer if strategy == "diloco" else [])), stop_at_epoch=3)
    plain, local = state(tmp_path / "plain"), state(tmp_path / "local")
    assert [name for name in plain if name in local and not torch.equal(plain[name], local[name])] == []


def test_a_loss_that_is_no_number_ends_the_run_and_names_what_is_left(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, stop_at_epoch=2)
    monkeypatch.setattr("training.objectives.swav.swapped_prediction_loss",
                        lambda scores, codes, config: scores.sum() * torch.nan)
    with pytest.raises(NonFiniteLoss, match="epoch 2") as ended:
        train(tmp_path, stop_at_epoch=3)
    assert str(tmp_path / "checkpoints") in str(ended.value)
    assert "non-finite-loss-0.safetensors" in str(ended.value)
    assert newest_checkpoint(tmp_path / "checkpoints").name == "epoch-00000002.safetensors"


@pytest.mark.parametrize("micro_batch", [6, 7, 8])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_two_updates_leaves_a_checkpoint_from_which_the_run_goes_on_exactly(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, micro_batch: int) -> None:
    train(tmp_path / "straight", stop_at_epoch=5)
    moment = JsonLines.moment

    def interrupted(teller: JsonLines, *arguments: Any) -> None:
        moment(teller, *arguments)
        steps.append(arguments)
        if len(steps) == micro_batch:
            os.kill(os.getpid(), number)

    steps: list[Any] = []
    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        patched.setattr(JsonLines, "moment", interrupted)
        train(tmp_path / "cut", stop_at_epoch=5)
    assert len(steps) == micro_batch
    assert newest_checkpoint(tmp_path / "cut" / "checkpoints").name == "epoch-00000002.safetensors"
    train(tmp_path / "cut", stop_at_epoch=5)
    assert_equal(state(tmp_path / "straight"), state(tmp_path / "cut"))
    assert signal.getsignal(number) is before


def test_a_second_interrupt_ends_the_process_at_once() -> None:
    code = ("import os, signal\nfrom peer.interrupts import leaving_on_signals\n"
            "with leaving_on_signals() as leave:\n"
            "    os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM)\n"
            "    print(leave.is_set(), flush=True)\n"
            "    os.kill(os.getpid(), signal.SIGINT)\n"
            "    print('never')\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "True\n", "")


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    train(tmp_path, stop_at_epoch=1)
    run_id = json.loads((tmp_path / "owner.json").read_text())["run_id"]
    with (open_state_dir(tmp_path, role="run", run_id=run_id),
          pytest.raises(BadInput, match=f"held by process {os.getpid()}")):
        train(tmp_path, stop_at_epoch=2)


def test_the_command_trains_serves_metrics_and_leaves_on_an_interrupt(tmp_path: Path) -> None:
    command = subprocess.Popen(
        [sys.executable, "-m", "peer.cli", "train", "demo_classification", "--run-dir", str(tmp_path), "--batch-size",
         "8", "--threads", "1", "--memory-format", "contiguous", "--metrics-port", "0", "--json",
         "averaging.target_batch_size=8", "model.trunk.width_multiplier=0.0625", "data.synthetic.num_train=64",
         "data.synthetic.num_val=16", "optimizer.max_epochs=1000000"],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert command.stdout
    where = ""
    for line in command.stdout:
        told = json.loads(line)
        where = told["where"] if told["event"] == "record" else where  # prometheus comes last
        if told["event"] == "epoch" and told["epoch"] == 3:
            break
    with urllib.request.urlopen(where, timeout=10) as reply:
        assert "covey_samples_total" in (text := reply.read().decode())
        assert "covey_train_top1_accuracy " in text
    command.send_signal(signal.SIGINT)
    output, errors = command.communicate(timeout=60)
    assert (command.returncode, errors) == (0, "")
    finished = json.loads(output.splitlines()[-1])
    assert finished["event"] == "finished"
    assert Path(finished["checkpoint"]).exists()
    assert 3 <= finished["epoch"] < finished["epochs"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_trunk_trains_as_the_plain_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("plain", "compiled"):
        train(tmp_path / name, tiny("classification"), compile=name == "compiled", stop_at_epoch=2)
    assert any((tmp_path / "cache").rglob("*.so")), "nothing was compiled"
    plain, compiled = state(tmp_path / "plain"), state(tmp_path / "compiled")
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=1e-4)
