"""Which process of a run this one is, and what Slurm's scripts start."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from averaging.experiment import load_experiment
from peer.place import Place, find_place, first_node
from peer.world import local_device
from training.errors import BadInput

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "deploy" / "slurm").glob("*.sbatch"))
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "one", "MASTER_PORT": "29500"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_NODELIST": "gpu[07-08]",
         "SLURM_JOB_ID": "54321"}
ONE = Place(rank=3, world_size=4, local_rank=1, master_addr="one", master_port=29500)


@pytest.mark.parametrize(("environment", "place"), [
    (TORCHRUN, ONE), (TORCHRUN | SLURM | {"SLURM_PROCID": "0"}, ONE),
    (SLURM, Place(3, 4, 1, "gpu07", 24321)),
    (SLURM | {"MASTER_ADDR": "one", "MASTER_PORT": "29500"}, ONE),
    ({}, None), (TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}, None), (SLURM | {"SLURM_NTASKS": "1"}, None),
    ({"MASTER_ADDR": "one", "MASTER_PORT": "1"}, None), ({"SLURM_NTASKS": "4"}, None)])
def test_the_place_is_torchruns_or_slurms(environment: dict[str, str], place: Place | None) -> None:
    assert find_place(environment) == place


@pytest.mark.parametrize(("environment", "line"), [
    *[({name: value for name, value in TORCHRUN.items() if name != left_out}, left_out) for left_out in TORCHRUN],
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE in the environment, and no RANK"),
    ({name: value for name, value in SLURM.items() if name != "SLURM_JOB_NODELIST"}, "no MASTER_ADDR"),
    (TORCHRUN | {"RANK": "4"}, "RANK = 4.*below 4"), (TORCHRUN | {"WORLD_SIZE": "two"}, "WORLD_SIZE = two")])
def test_half_a_place_is_refused_in_a_line(environment: dict[str, str], line: str) -> None:
    with pytest.raises(BadInput, match=line):
        find_place(environment)


@pytest.mark.parametrize(("nodes", "first"), [
    ("one", "one"), ("one,two", "one"), ("gpu[012-015,020],cpu1", "gpu012"), ("a[3,5-7]-x,b", "a3-x")])
def test_the_first_of_slurms_nodes(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_every_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    chosen = {(4, "auto"): "cuda:1", (2, "cuda"): "cuda:1", (1, "auto"): "cuda:0", (4, "cpu"): "cpu"}
    for (count, wanted), device in chosen.items():
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert local_device(wanted, ONE) == device
        assert local_device(wanted, None) == wanted
    with pytest.raises(BadInput, match="cuda:2 for 4 processes"):
        local_device("cuda:2", ONE)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(BadInput, match="2 GPUs"):
        local_device("auto", Place(3, 4, 3, "one", 1))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_slurms_scripts_start_what_covey_knows(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text().replace("\\\n", " ")
    [command] = re.findall(r"^srun .*(?:covey|peer\.cli) train (.*)$", text, re.MULTILINE)
    [recipe] = re.findall(r"^RECIPE=(\S+)", text, re.MULTILINE)
    words = shlex.split(command.replace("$RECIPE", recipe))
    overrides = [word for word in words if re.match(r"[a-z_.]+=", word)]
    assert load_experiment(words[0], overrides).averaging.target_batch_size == 1024
    known = subprocess.run([sys.executable, "-m", "peer.cli", "train", "--help"], capture_output=True, text=True,
                           check=True, cwd=ROOT, env={"COLUMNS": "200", "PATH": ""}).stdout
    options = [word for word in words if word.startswith("--")]
    assert len(options) >= 5
    assert [option for option in options if option not in known] == []


def test_there_are_scripts_for_one_node_and_for_several() -> None:
    assert [script.name for script in SCRIPTS] == ["nodes.sbatch", "one_node.sbatch"]
