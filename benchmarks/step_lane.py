"""One side of the comparison of steps: `python -m benchmarks.step_lane JSON`, a process of its own.

A step is forward, loss, backward and update, on crops that stay the same. For every line of its input it does one
and prints {"seconds", "cpu_seconds", "parts"}; at the end of input {"peak_bytes"}.
"""

import json
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from time import perf_counter, process_time

import torch
from lightly.loss import SwaVLoss
from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes
from torch import Tensor, nn
from torch.nn import functional
from torchvision import models

from training.config import validate
from training.loop import LocalStepper
from training.objectives.objective import build_objective
from training.optimizers.build import build_optimizer, govern
from training.precision import Precision
from training.recipe import SwavTraining
from training.tuning import keep_memory, lay_out

HIDDEN, EMBEDDING, PROTOTYPES = 2048, 128, 3000
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-6}


@dataclass
class Case:
    """What is stepped: who does it, on which trunk, with which crops."""

    side: str                     # "covey", "lightly", or "lightly/size": with one pass per size of crop, as covey has
    bf16: bool
    depth: int
    num_crops: tuple[int, int]    # large, small
    size_crops: tuple[int, int]   # pixels
    batch: int
    device: str
    threads: int


@dataclass
class Clock:
    """Seconds of the parts of a step."""

    device: torch.device
    parts: dict[str, float] = field(default_factory=dict)

    def now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return perf_counter()

    def add(self, part: str, since: float) -> float:
        """Counts the time from `since` to now, which it returns, to `part`."""
        now = self.now()
        self.parts[part] = self.parts.get(part, 0.0) + now - since
        return now


def covey(case: Case, device: torch.device, clock: Clock) -> Callable[[list[Tensor]], None]:
    """The step of a worker (training/loop.py), with what a worker finds out at its start."""
    keep_memory()
    training = validate(SwavTraining, {
        "name": "step", "optimizer": SGD | {"max_epochs": 1},
        "model": {"trunk": {"depth": case.depth}, "amp": {"use_amp": case.bf16, "dtype": "bf16"},
                  "head": {"dims": [0, HIDDEN, EMBEDDING], "num_clusters": [PROTOTYPES]}},
        "data": {"transforms": {
            "total_num_crops": sum(case.num_crops), "num_crops": case.num_crops, "size_crops": case.size_crops,
            "crop_scales": [[0.14, 1.0], [0.05, 0.14]]}}})
    objective = build_objective(training, batch_size=case.batch).to(device).train()
    precision = Precision(training.model.amp, device, objective.parameters())
    lay_out(objective, "auto", case.size_crops, device, precision)
    stepper = LocalStepper(build_optimizer(training.optimizer, objective), target_batch_size=1)
    govern(stepper.optimizer, objective, lambda epoch: SGD["lr"], lambda: stepper.epoch)
    trunk_started = 0.0

    def before_trunk(*_: object) -> None:
        nonlocal trunk_started
        trunk_started = clock.now()

    objective.backbone.register_forward_pre_hook(before_trunk)
    objective.backbone.register_forward_hook(lambda *_: clock.add("trunk", trunk_started) and None)

    def step(views: list[Tensor]) -> None:
        started = clock.now()
        with precision.autocast():
            loss, metrics = objective(views, None, stepper.epoch)
        started = clock.add("trunk, head, loss", started)
        precision.backward(loss)
        started = clock.add("backward", started)
        torch.stack([loss.detach(), *metrics.values()]).tolist()
        stepper.step(case.batch)
        clock.add("update", started)

    return step


def lightly(case: Case, device: torch.device, clock: Clock) -> Callable[[list[Tensor]], None]:
    """The loop of lightly's documentation: its modules, one pass of torchvision's trunk per crop (or per size)."""
    trunk = getattr(models, f"resnet{case.depth}")(weights=None)
    width, trunk.fc = trunk.fc.in_features, nn.Identity()
    prototypes, criterion = SwaVPrototypes(EMBEDDING, PROTOTYPES), SwaVLoss()
    model = nn.ModuleList([trunk, SwaVProjectionHead(width, HIDDEN, EMBEDDING), prototypes]).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    per_crop = case.side == "lightly"

    def score(crops: Tensor) -> tuple[Tensor, ...]:
        return prototypes(functional.normalize(model[1](trunk(crops)), dim=1, p=2)).float().split(case.batch)

    def step(views: list[Tensor]) -> None:
        started = clock.now()
        prototypes.normalize()
        with torch.autocast(device.type, torch.bfloat16, enabled=case.bf16):
            large, small = ([scores for crops in group.split(case.batch if per_crop else len(group))
                             for scores in score(crops)] for group in views)
        loss = criterion(large, small)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        clock.add("step", started)

    return step


def main() -> None:
    """Make one step to warm up, then one for every line."""
    case = Case(**json.loads(sys.argv[1]))
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    device = torch.device(case.device)
    clock = Clock(device)
    step = (covey if case.side == "covey" else lightly)(case, device, clock)
    views = [torch.randn(count * case.batch, 3, size, size, device=device)
             for count, size in zip(case.num_crops, case.size_crops, strict=True)]
    step(views)
    print(json.dumps(asdict(case)), flush=True)
    for _ in sys.stdin:
        clock.parts.clear()
        started, cpu_started = clock.now(), process_time()
        step(views)
        print(json.dumps({"seconds": clock.now() - started, "cpu_seconds": process_time() - cpu_started,
                          "parts": clock.parts}), flush=True)
    peak = (torch.cuda.max_memory_allocated() if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    print(json.dumps({"peak_bytes": peak}), flush=True)


if __name__ == "__main__":
    main()
