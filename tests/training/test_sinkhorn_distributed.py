"""Two processes, over gloo, against one with the joined batch. Run as a script, this is one of the two."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from training.config import validate
from training.objectives.config import SwavLoss
from training.objectives.objective import build_objective
from training.objectives.swav import Swav, assignments, swapped_prediction_loss
from training.recipe import SwavTraining

BATCH, PROCESSES, QUEUE, STEPS = 3, 2, 12, 4  # images per process; embeddings in both queues together
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
CONFIGS = {
    "as_published": SwavLoss(),
    "double": SwavLoss(use_double_precision=True, epsilon=0.02),
    "rounded": SwavLoss(temp_hard_assignment_iters=1),
    "power_law": SwavLoss(power_law_exponent=1.0),
    "many_iterations": SwavLoss(num_iters=20, crops_for_assign=(2, 0, 1)),
}
INPUTS = ["cosines", "peak_in_one_process", "prototype_out_of_reach", "infinite_in_one_process"]
# No BatchNorm, which would tell the processes' batches from the joined one.
TRAINING = {
    "name": "two", "seed": 3,
    "model": {"trunk": {"depth": 18, "width_multiplier": 0.125, "stem": "3x3", "norm": "layer"},
              "head": {"dims": [0, 16, 8], "num_clusters": [6, 9], "use_bn": False}},
    "loss": {"queue": {"queue_length": QUEUE + 1}},
    "data": {"transforms": {"total_num_crops": 3, "num_crops": [2, 1], "size_crops": [16, 8],
                            "crop_scales": [[0.3, 1.0], [0.1, 0.3]]}},
    "optimizer": {"lr": 0.1, "max_epochs": 10},
}


def scores(kind: str) -> Tensor:
    """[V, images of both processes, K]."""
    joined = torch.rand(3, PROCESSES * BATCH, 5, generator=torch.Generator().manual_seed(1)) * 2 - 1
    if kind == "peak_in_one_process":
        joined[:, BATCH:] *= 0.2
    elif kind == "prototype_out_of_reach":
        joined[..., 1] = -100
        joined[:, 0, 1] = -3
    elif kind == "infinite_in_one_process":
        joined[0, BATCH, 2] = torch.inf
    return joined


def own(joined: Tensor, rank: int) -> Tensor:
    """A process' share of images [V, B, ...]."""
    return joined[:, rank * BATCH:(rank + 1) * BATCH]


def views(step: int) -> list[Tensor]:
    """[crops, images of both processes, 3, S, S] per size of crop."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(crops, PROCESSES * BATCH, 3, side, side, generator=generator)
            for crops, side in ((2, 16), (1, 8))]


def run(rank: int | None, group: distributed.ProcessGroup | None, folder: Path) -> dict[str, Tensor]:
    """All that is compared, computed by process `rank`, or by one alone with the joined batch."""
    def mine(joined: Tensor) -> Tensor:
        return joined if rank is None else own(joined, rank)

    found = {}
    for kind in INPUTS:
        for name, config in CONFIGS.items():
            s = mine(scores(kind))
            codes = assignments(s[list(config.crops_for_assign)], config, epoch=0, group=group,
                                queued=mine(scores("cosines").flip(0))[:len(config.crops_for_assign)])
            found[f"{kind}.{name}.codes"] = codes
            found[f"{kind}.{name}.loss"] = swapped_prediction_loss(s.nan_to_num(posinf=1), codes, config)

    objective = build_objective(validate(SwavTraining, TRAINING), group=group, output_dir=folder,
                                batch_size=PROCESSES * BATCH if rank is None else BATCH)
    assert isinstance(objective, Swav)
    for step in range(STEPS):
        loss, _ = objective([mine(crops).flatten(0, 1) for crops in views(step)], None, epoch=0)
        found[f"step{step}.loss"] = loss.detach()
    loss.backward()
    found |= {f"gradient.{name}": p.grad for name, p in objective.named_parameters() if p.grad is not None}
    found["queue"] = objective.queue.embeddings
    assert objective.write_dump()
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """What one process finds, and what each of two does."""
    folder = tmp_path_factory.mktemp("two")
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=environment)
                 for rank in range(PROCESSES)]
    try:
        joined = run(None, None, folder / "joined")
        assert [process.wait(120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    assert sorted(path.name for path in folder.glob("non-finite-loss-*")) == [
        "non-finite-loss-0.safetensors", "non-finite-loss-1.safetensors"]
    return joined, [load_file(folder / f"{rank}.safetensors") for rank in range(PROCESSES)]


Results = tuple[dict[str, Tensor], list[dict[str, Tensor]]]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", INPUTS)
def test_two_processes_assign_as_one_with_the_joined_batch(results: Results, kind: str, name: str) -> None:
    joined, apart = results
    codes = torch.cat([process[f"{kind}.{name}.codes"] for process in apart], dim=1)
    torch.testing.assert_close(codes, joined[f"{kind}.{name}.codes"], **CLOSE)
    loss = torch.stack([process[f"{kind}.{name}.loss"] for process in apart]).mean()
    torch.testing.assert_close(loss, joined[f"{kind}.{name}.loss"], **CLOSE)


@pytest.mark.parametrize("kind", INPUTS)
def test_each_process_by_itself_would_assign_otherwise(results: Results, kind: str) -> None:
    alone = assignments(own(scores(kind), 0)[:2], SwavLoss(), epoch=0)
    assert (alone - results[1][0][f"{kind}.as_published.codes"]).abs().max() > 0.01


@pytest.mark.parametrize("step", range(STEPS))
def test_loss_with_queues_is_that_of_one_process_with_the_joined_batch(results: Results, step: int) -> None:
    joined, apart = results
    loss = torch.stack([process[f"step{step}.loss"] for process in apart]).mean()
    torch.testing.assert_close(loss, joined[f"step{step}.loss"], **CLOSE)


def test_gradient_is_the_mean_of_theirs(results: Results) -> None:
    joined, apart = results
    for name in (name for name in joined if name.startswith("gradient.")):
        mean = torch.stack([process[name] for process in apart]).mean(0)
        torch.testing.assert_close(mean, joined[name], rtol=1e-4, atol=1e-6)


def test_each_queue_holds_its_own_embeddings_and_its_share_of_the_length(results: Results) -> None:
    joined, apart = results
    assert [tuple(process["queue"].shape) for process in apart] == [(2, QUEUE // PROCESSES, 8)] * PROCESSES
    for rank, process in enumerate(apart):
        newest_first = torch.cat([own(batch, rank) for batch in joined["queue"].split(PROCESSES * BATCH, dim=1)], dim=1)
        torch.testing.assert_close(process["queue"], newest_first, **CLOSE)


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), PROCESSES)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=60))
    found = run(rank, distributed.group.WORLD, folder)
    save_file({name: tensor.detach().contiguous() for name, tensor in found.items()}, folder / f"{rank}.safetensors")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
