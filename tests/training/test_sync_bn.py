"""Four processes on loopback, in pairs or all together, against one process that has their images."""

import copy
import os
from collections.abc import Callable
from multiprocessing import set_forkserver_preload
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp

from training.errors import BadInput
from training.models.config import SyncBn
from training.models.recompute import Recomputed
from training.models.sync_bn import synchronise

WORLD = 4
BATCHES = (3, 5, 2, 4)  # processes need not have equally many images
GROUPS = {"all": (0, [0, 1, 2, 3]), "pairs": (2, [2, 3]), "machine": (-1, [2, 3])}  # option, the ranks of rank 2
STEPS = 2


def network() -> nn.Module:
    torch.manual_seed(0)
    blocks = Recomputed(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.ReLU()))
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), blocks, nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(4, 5), nn.BatchNorm1d(5)).double()


def images(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(BATCHES[rank], 3, 8, 8, generator=generator, dtype=torch.float64) + rank


def train(module: nn.Module, ranks: list[int]) -> dict[str, Tensor]:
    """Outputs, gradients and statistics after steps on the images of `ranks`."""
    outputs = [module(torch.cat([images(rank, step) for rank in ranks])) for step in range(STEPS)]
    torch.stack([(output.sin() * torch.arange(5)).sum() for output in outputs]).sum().backward()
    gradients = {f"gradient.{name}": parameter.grad for name, parameter in module.named_parameters()}
    return {"outputs": torch.cat(outputs).detach(), **gradients, **dict(module.named_buffers())}


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    for name, (group_size, _) in GROUPS.items():
        config = SyncBn(convert_bn_to_sync_bn=True, group_size=group_size)
        module = synchronise(network(), config, log=lambda line: None)
        result = train(copy.deepcopy(module), [rank])
        save_file(result, folder / f"{name}-{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sync_bn")
    set_forkserver_preload(["training.models.sync_bn"])  # torch is imported once rather than by every process
    mp.start_processes(work, (folder,), nprocs=WORLD, start_method="forkserver")
    return folder


@pytest.mark.parametrize("name", GROUPS)
def test_processes_equal_one_with_the_joined_batch(folder: Path, name: str) -> None:
    _, ranks = GROUPS[name]
    results = [load_file(folder / f"{name}-{rank}.safetensors") for rank in ranks]
    expected = train(network(), ranks)
    by_step = [torch.split(result["outputs"], BATCHES[rank]) for rank, result in zip(ranks, results, strict=True)]
    outputs = torch.cat([by_step[i][step] for step in range(STEPS) for i in range(len(ranks))])
    torch.testing.assert_close(outputs, expected.pop("outputs"), rtol=1e-9, atol=1e-9)
    for key, value in expected.items():
        found = [result[key] for result in results]
        joined = torch.stack(found).sum(0) if key.startswith("gradient.") else found[0]
        torch.testing.assert_close(joined, value, rtol=1e-9, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


def test_two_pairs_know_nothing_of_each_other(folder: Path) -> None:
    statistics = [load_file(folder / f"pairs-{rank}.safetensors")["1.running_mean"] for rank in range(WORLD)]
    torch.testing.assert_close(statistics[0], statistics[1], rtol=0, atol=0)
    assert (statistics[0] - statistics[2]).abs().max() > 0.01


def test_a_process_on_its_own_keeps_its_layers() -> None:
    module = network()
    synchronise(module, SyncBn(convert_bn_to_sync_bn=True), log=pytest.fail)
    assert not any(isinstance(layer, nn.SyncBatchNorm) for layer in module.modules())


@pytest.fixture
def world_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def pretend(size: int) -> None:
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda: size)
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return pretend


def test_groups_have_to_divide_the_processes(world_of: Callable[[int], None]) -> None:
    world_of(6)
    with pytest.raises(BadInput, match="6 processes in groups of 4"):
        synchronise(network(), SyncBn(convert_bn_to_sync_bn=True, group_size=4), log=pytest.fail)


def test_this_machines_processes_have_to_be_known(world_of: Callable[[int], None]) -> None:
    world_of(4)
    with pytest.raises(BadInput, match="LOCAL_WORLD_SIZE"):
        synchronise(network(), SyncBn(convert_bn_to_sync_bn=True), log=pytest.fail)


def test_apex_means_pytorchs_and_says_so(world_of: Callable[[int], None]) -> None:
    world_of(2)
    lines: list[str] = []
    config = SyncBn(convert_bn_to_sync_bn=True, sync_bn_type="apex", group_size=8)
    module = synchronise(network(), config, log=lines.append)  # fewer processes than the group: all of them
    assert len(lines) == 1
    assert "apex" in lines[0]
    assert sum(isinstance(layer, nn.SyncBatchNorm) for layer in module.modules()) == 3


def test_evaluation_needs_no_other_process(world_of: Callable[[int], None]) -> None:
    world_of(2)
    plain = network().eval()
    expected = plain(images(0, 0))
    module = synchronise(plain, SyncBn(convert_bn_to_sync_bn=True, group_size=0), log=pytest.fail)
    torch.testing.assert_close(module(images(0, 0)), expected, rtol=0, atol=0)
