"""`covey train` in two processes over gloo: what they learn together, resumption, leaving, and a loss."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from socket import create_server
from time import monotonic
from typing import Any

import psutil
import pytest
import torch
from processes import is_running
from torch import Tensor

from averaging.experiment import experiment_of
from peer.loggers.csv import read_rows
from peer.run_config import RunConfig
from peer.train import train_alone
from training.checkpoint import newest_checkpoint, read_checkpoint
from training.config import override
from training.errors import BadInput

ROOT = Path(__file__).parents[2]
DATA = {"dataset": "synthetic", "image_size": 32, "num_classes": 16, "synthetic": {"num_train": 80, "num_val": 32},
        "transforms": {"total_num_crops": 1, "num_crops": [1], "size_crops": [32], "crop_scales": [[0.3, 1.0]]}}
CLASSIFICATION = {
    "name": "tiny", "objective": "classification", "model": {"trunk": {"name": "lenet"}}, "data": DATA,
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "max_epochs": 6},
    "evaluation": {"resize_size": 32, "crop_size": 32}, "averaging": {"target_batch_size": 32, "target_group_size": 2}}
SWAV = {
    "name": "tiny", "model": {"trunk": {"depth": 18, "width_multiplier": 0.0625, "stem": "3x3/2"},
                              "head": {"dims": [0, 16, 8], "num_clusters": [6]},
                              "sync_bn": {"convert_bn_to_sync_bn": True}},
    "loss": {"queue": {"queue_length": 32, "start_iter": 1}},
    "data": {"dataset": "synthetic", "image_size": 16, "synthetic": {"num_train": 80, "num_val": 32},
             "transforms": {"total_num_crops": 3, "num_crops": [2, 1], "size_crops": [16, 12],
                            "crop_scales": [[0.3, 1.0], [0.1, 0.3]]}},
    "optimizer": {"name": "sgd", "lr": 0.1, "use_larc": True, "warmup_epochs": 3, "max_epochs": 6},
    "evaluation": {"resize_size": 16, "crop_size": 16, "knn_k": 5},
    "averaging": {"target_batch_size": 32, "target_group_size": 2}}
LOCAL = ["averaging.local_steps=2"]
KINDS: dict[str, tuple[Mapping[str, Any], list[str]]] = {
    "classification": (CLASSIFICATION, []),
    "swav": (SWAV, []),
    "local_sgd": (CLASSIFICATION, ["averaging.strategy=local_sgd", *LOCAL]),
    "diloco": (CLASSIFICATION, ["averaging.strategy=diloco", *LOCAL, "averaging.compression=blockwise8bit"]),
    "gossip": (CLASSIFICATION, ["averaging.strategy=gossip"]),
    "overlap": (CLASSIFICATION, ["averaging.overlap=true", "averaging.compression=fp16"]),
}
EXACT = [kind for kind in KINDS if kind != "overlap"]  # resumed to the bit
KEEP_THEIR_OWN = [kind for kind in EXACT if kind != "classification"]  # a checkpoint for each process


def tree(kind: str) -> dict[str, Any]:
    recipe, overrides = KINDS[kind]
    return override(recipe, overrides)


def runs() -> list[dict[str, Any]]:
    """Each kind at a stretch, and cut in two."""
    found = []
    for kind in KINDS:
        base = {"experiment": tree(kind), "options": {"checkpoint_every_epochs": 3}}
        found += [{**base, "name": f"{kind}-straight"},
                  {**base, "name": f"{kind}-cut", "options": {"stop_at_epoch": 3}},
                  {**base, "name": f"{kind}-cut"}]
    base = {"experiment": tree("classification"), "options": {}}
    found += [{**base, "name": "left", "leave": [1, 5]}, {**base, "name": "left"}]
    return [{**run, "port": port} for run, port in zip(found, free_ports(len(found)), strict=True)]


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        return [held.enter_context(create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have left of all runs."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "runs.json").write_text(json.dumps(runs()))
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
                           "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
                           "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    processes = [subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("world_process.py")), str(folder)], text=True,
        stdout=(folder / f"{rank}.out").open("w"), stderr=(folder / f"{rank}.err").open("w"),
        env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    try:
        ended = [process.wait(150) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert ended == [0, 0], "".join((folder / f"{rank}.err").read_text() for rank in range(2))
    return folder


def state(run_dir: Path, rank: int = 0) -> dict[str, Tensor]:
    path = newest_checkpoint(run_dir / "checkpoints" / (f"process-{rank:04d}" if rank else ""))
    assert path
    return read_checkpoint(path).tensors


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process learns in twice as many micro-batches."""
    torch.set_num_threads(1)
    run_dir = tmp_path_factory.mktemp("alone")
    train_alone(experiment_of(tree("classification")), RunConfig(
        run_dir=run_dir, batch_size=8, device="cpu", memory_format="contiguous", threads=1), as_json=True)
    return run_dir


def test_two_processes_learn_what_one_learns_in_twice_the_micro_batches(folder: Path, alone: Path) -> None:
    """Which also shows that they share out the images of the passes, and take the same views of them."""
    one, two = state(alone), state(folder / "classification-straight")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    steps = [json.loads((folder / f"classification-straight-{rank}.steps").read_text()) for rank in range(2)]
    assert steps == [list(range(1, 13))] * 2
    columns = ("epoch", "samples_total", "learning_rate", "top1_accuracy")
    ours, theirs = (read_rows(run / "metrics.csv") for run in (folder / "classification-straight", alone))
    assert [[row.get(name) for name in columns] for row in ours] == [[row.get(name) for name in columns]
                                                                      for row in theirs]


@pytest.mark.parametrize("kind", EXACT)
def test_a_run_cut_in_two_equals_one_that_went_straight_on_in_every_process(folder: Path, kind: str) -> None:
    for rank in range(2 if kind in KEEP_THEIR_OWN else 1):
        assert_equal(state(folder / f"{kind}-straight", rank), state(folder / f"{kind}-cut", rank))
    straight, cut = (read_rows(folder / f"{kind}-{name}" / "metrics.csv") for name in ("straight", "cut"))
    same = straight[0].keys() - {"samples_per_second"}
    assert len(straight) == 6
    assert [[row[name] for name in same] for row in straight] == [[row[name] for name in same] for row in cut]


@pytest.mark.parametrize("kind", KEEP_THEIR_OWN)
def test_parameters_are_equal_at_the_end(folder: Path, kind: str) -> None:
    first, second = (state(folder / f"{kind}-straight", rank) for rank in range(2))
    names = [name for name in first if name.startswith("objective.")]
    assert all(torch.equal(first[name], second[name]) for name in names)
    assert all(first[name].isfinite().all() for name in names)


def test_each_process_has_a_queue_of_its_own_with_half_of_the_places(folder: Path) -> None:
    first, second = (state(folder / "swav-straight", rank)["local.queue.embeddings"] for rank in range(2))
    assert first.shape == second.shape == (2, 16, 8)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", ["local_sgd", "diloco", "gossip", "overlap"])
def test_a_strategy_learns_something_else_than_the_baseline(folder: Path, kind: str) -> None:
    """Or the option would not have reached it."""
    baseline, other = (state(folder / f"{name}-straight") for name in ("classification", kind))
    assert any(not torch.allclose(baseline[name], other[name], rtol=1e-3, atol=1e-4) for name in baseline
               if name.startswith("objective."))


def test_only_rank_0_tells(folder: Path) -> None:
    told = [json.loads(line) for line in (folder / "0.out").read_text().splitlines()]
    assert [each["processes"] for each in told if each["event"] == "ready"] == [2] * len(runs())
    assert (folder / "1.out").read_text() == ""


def test_gossip_tells_how_far_the_models_were_from_their_mean(folder: Path) -> None:
    assert read_rows(folder / "gossip-straight" / "metrics.csv")[-1]["d2c"] > 0


def test_told_to_leave_one_process_takes_all_along_after_the_same_micro_batch(folder: Path, alone: Path) -> None:
    first, second = (json.loads((folder / f"left-{rank}.steps").read_text()) for rank in range(2))
    assert first == second
    assert_equal(state(folder / "left"), state(folder / "classification-straight"))


TRAIN_FOR_EVER = [
    "-m", "peer.cli", "train", "demo_classification", "--batch-size", "8", "--device", "cpu", "--threads", "1",
    "--memory-format", "contiguous", "--json", "averaging.target_batch_size=16", "model.trunk.width_multiplier=0.0625",
    "data.synthetic.num_train=64", "data.synthetic.num_val=16", "optimizer.max_epochs=1000000"]


def start(run_dir: Path, *before: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *before, *TRAIN_FOR_EVER, "--run-dir", str(run_dir)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment})


def wait_for_an_epoch(process: subprocess.Popen[str]) -> None:
    assert process.stdout
    for line in process.stdout:
        if json.loads(line)["event"] == "epoch":
            break


def test_torchrun_that_is_terminated_leaves_a_checkpoint_and_no_process(tmp_path: Path) -> None:
    torchrun = start(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    children: list[psutil.Process] = []
    try:
        wait_for_an_epoch(torchrun)
        children = psutil.Process(torchrun.pid).children(recursive=True)
        torchrun.terminate()
        output, errors = torchrun.communicate(timeout=60)
    finally:
        for process in (*children, torchrun):
            process.kill() if is_running(process.pid) else None
    finished = json.loads(output.splitlines()[-1])
    assert finished["event"] == "finished"
    assert Path(finished["checkpoint"]).exists()
    assert len(children) >= 2
    assert "covey:" not in errors  # nothing went wrong
    assert not any(is_running(child.pid) for child in children)


@pytest.mark.parametrize("rank", [0, 1])
def test_where_a_process_is_lost_the_other_says_so_and_ends(tmp_path: Path, rank: int) -> None:
    """Without torchrun, which would end it, too."""
    [port] = free_ports(1)
    processes = [start(tmp_path, RANK=str(each), LOCAL_RANK=str(each), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=str(port)) for each in range(2)]
    try:
        wait_for_an_epoch(processes[0])
        processes[rank].kill()
        killed = monotonic()
        _, errors = processes[1 - rank].communicate(timeout=30)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert monotonic() - killed < 10
    assert (processes[1 - rank].returncode, errors.count("\n")) == (1, 1), errors
    assert errors.startswith(f"covey: process {rank} of this run has ended")


def test_processes_that_do_not_come_together_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [port] = free_ports(1)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("peer.world.START_SECONDS", 1.0)
    with pytest.raises(BadInput, match=f"process 1 of 2 alone at 127.0.0.1:{port}"):
        train_alone(experiment_of(tree("classification")), RunConfig(run_dir=tmp_path, device="cpu"), as_json=True)
