import copy
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from training import tuning
from training.models.config import Amp
from training.objectives.objective import Objective, build_objective
from training.precision import Precision
from training.recipe import SwavTraining
from training.tuning import fastest_memory_format, lay_out

CPU = torch.device("cpu")
Tiny = Callable[..., SwavTraining]


class Trunk(nn.Module):
    """Says which formats it was run in."""

    def __init__(self, runs: list[bool]) -> None:
        super().__init__()
        self.conv, self.drop, self.runs = nn.Conv2d(3, 2, 3), nn.Dropout(), runs

    def forward(self, images: Tensor) -> Tensor:
        self.runs.append(self.conv.weight.is_contiguous(memory_format=torch.channels_last))
        return self.drop(self.conv(images)).mean((2, 3))

    def __deepcopy__(self, memo: dict[int, object]) -> "Trunk":
        twin = Trunk(self.runs)
        twin.conv = copy.deepcopy(self.conv)
        return twin


class Watched(Objective):
    def __init__(self) -> None:
        super().__init__()
        self.runs: list[bool] = []
        self.backbone = Trunk(self.runs)

    def forward(self, views: list[Tensor], labels: Tensor | None, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError


def clock(monkeypatch: pytest.MonkeyPatch, objective: Watched, *, contiguous: float, channels_last: float) -> None:
    """Time in which each pass over a crop takes so long as is said of its format."""
    monkeypatch.setattr(tuning, "perf_counter",
                        lambda: sum(channels_last if last else contiguous for last in objective.runs))


def fastest(objective: Objective, amp: Amp | None = None, **options: float) -> torch.memory_format:
    precision = Precision(amp or Amp(), CPU, objective.parameters())
    return fastest_memory_format(objective, (16, 8), CPU, precision, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("contiguous", "channels_last", "best"), [
    (1.0, 0.5, torch.channels_last), (0.5, 1.0, torch.contiguous_format), (1.0, 0.99, torch.contiguous_format)])
def test_faster_format_is_chosen_and_the_plain_one_where_they_are_even(
        monkeypatch: pytest.MonkeyPatch, contiguous: float, channels_last: float, best: torch.memory_format) -> None:
    objective = Watched()
    clock(monkeypatch, objective, contiguous=contiguous, channels_last=channels_last)
    assert fastest(objective, budget_seconds=100) is best


def test_formats_are_measured_in_turns_over_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = Watched()
    clock(monkeypatch, objective, contiguous=1, channels_last=1)
    fastest(objective, budget_seconds=100, turns=2)
    assert objective.runs == [False, False, True, True] * 3


def test_no_turn_begins_beyond_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = Watched()
    clock(monkeypatch, objective, contiguous=60, channels_last=30)
    assert fastest(objective) is torch.channels_last
    assert len(objective.runs) == 8  # a warm-up and one turn of each


@pytest.mark.parametrize("amp", [Amp(), Amp(use_amp=True)])
def test_measuring_changes_nothing(tiny: Tiny, amp: Amp) -> None:
    objective = build_objective(tiny()).eval()
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    random = torch.get_rng_state()
    assert fastest(objective, amp) in (torch.channels_last, torch.contiguous_format)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in objective.state_dict().items())
    assert not objective.training
    assert all(p.grad is None and p.is_contiguous() for p in objective.parameters())


def test_channels_last_computes_the_same(tiny: Tiny) -> None:
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(8, 3, side, side, generator=generator) for side in (16, 8)]
    plain, last = (build_objective(tiny()) for _ in range(2))
    lay_out(last, "channels_last", (16, 8), CPU, Precision(Amp(), CPU, last.parameters()))
    losses = [objective(views, None, epoch=0)[0] for objective in (plain, last)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for ours, theirs in zip(last.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-2, atol=1e-4)


def test_synchronised_norms_wait_for_nobody_while_measuring(tiny: Tiny) -> None:
    objective = build_objective(tiny())
    objective.backbone = nn.SyncBatchNorm.convert_sync_batchnorm(objective.backbone)
    twin = tuning._copy(objective.backbone, torch.channels_last)
    synchronised = [module for module in twin.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert synchronised
    assert not any(module.training for module in synchronised)


def test_memory_that_was_freed_stays_with_the_process_and_is_used_again() -> None:
    script = ("import resource, torch; from training.tuning import keep_memory; print(keep_memory())\n"
              "for turn in range(64):\n"
              "    torch.ones(2**22)\n"  # 16 MiB
              "    usage = resource.getrusage(resource.RUSAGE_SELF)\n"
              "    print(usage.ru_minflt, usage.ru_maxrss)\n")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    kept, *turns = done.stdout.splitlines()
    if kept == "False":
        pytest.skip("this C library has no mallopt")
    (faults, resident), (faults_after, resident_after) = (map(int, turns[turn].split()) for turn in (8, 63))
    assert faults_after - faults < 2**14  # fewer pages of 4 KiB than 4 of the 55 blocks have
    assert resident_after - resident < 2**16  # KiB: 4 blocks
