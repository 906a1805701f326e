"""`python -m benchmarks.averaging_accumulation`: what gathering gradients costs beside plain PyTorch (hivemind#566).

torchvision's ResNet-50, one thread. The plain side lets autograd add to `.grad`, as PyTorch users accumulate; the
others hand every micro-batch to `step`, of a strategy in a swarm of one that never has enough samples. Each side is a
process, and they take turns.
"""

import averaging.fork  # noqa: F401

# isort: split
import argparse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from time import perf_counter, process_time

import torch
from rich.console import Console
from torch import Tensor, nn
from torchvision.models import resnet50

from averaging.config import Averaging
from averaging.strategies.open import open_strategy
from benchmarks.averaging_lanes import RUN_ID, STOCK, join
from benchmarks.averaging_peers import Child, Place, forked, introduce, start_node
from benchmarks.averaging_tables import print_table, spread, verdict, wide_console
from benchmarks.stock_hivemind import StockHivemind

TURNS = 7
BATCH, PIXELS = 32, 64
NEVER = 1 << 40  # samples
GOAL = 0.02
PLAIN, OURS = "plain PyTorch", "covey"


@dataclass(frozen=True)
class Turn:
    """Seconds; of processor time, which other work on the machine changes little."""

    adding: float       # gradients that are there already
    micro_batch: float  # forward, backward and accumulation
    micro_batch_cpu: float


def _plain(model: nn.Module) -> Callable[[list[Tensor]], None]:
    def add(grads: list[Tensor]) -> None:
        """As autograd does for a `.grad` that is there."""
        for param, grad in zip(model.parameters(), grads, strict=True):
            assert param.grad is not None
            param.grad += grad

    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    return add


def _stepping(model: nn.Module, step: Callable[[int], object]) -> Callable[[list[Tensor]], None]:
    def add(grads: list[Tensor]) -> None:
        for param, grad in zip(model.parameters(), grads, strict=True):
            param.grad = grad
        step(BATCH)

    return add


def _live(place: Place, side: str) -> None:
    torch.manual_seed(0)
    model = resnet50()
    step: Callable[[int], object] = lambda samples: None  # noqa: E731
    if side == STOCK:
        step = StockHivemind(
            dht=start_node(place), run_id=RUN_ID, params=model.parameters(), target_batch_size=NEVER,
            peers=2, optimizer=lambda params: torch.optim.SGD(params, lr=0.1), on_round=lambda _: None,
            on_state_load=lambda _: None).step
    elif side == OURS:
        _, swarm, config = join(place, Averaging(target_batch_size=NEVER, target_group_size=2))
        step = open_strategy(config, transport=swarm, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)).step
    add = _plain(model) if side == PLAIN else _stepping(model, step)
    images, grads = torch.randn(BATCH, 3, PIXELS, PIXELS), [torch.randn_like(p) for p in model.parameters()]
    pipe = place.pipe
    pipe.send("ready")
    while True:
        pipe.recv()
        fresh = [grad.clone() for grad in grads]
        started = perf_counter()
        add(fresh)
        adding = perf_counter() - started
        started, cpu_started = perf_counter(), process_time()
        model(images).square().mean().backward()
        step(BATCH)
        pipe.send(Turn(adding, perf_counter() - started, process_time() - cpu_started))


def measure(turns: int) -> dict[str, list[Turn]]:
    """The sides' turns, after one to warm up."""
    with ExitStack() as stack:
        sides: dict[str, Child] = {}
        for side in (PLAIN, STOCK, OURS):
            (child,) = stack.enter_context(forked(1, _live, side))
            sides[side] = child
            if side == PLAIN:
                assert child.hear() == "ready"
            else:
                introduce([child])
        found: dict[str, list[Turn]] = {side: [] for side in sides}
        for _ in range(turns + 1):
            for side, child in sides.items():
                child.pipe.send("go")
                found[side].append(child.hear())
    return {side: all_turns[1:] for side, all_turns in found.items()}


def compare(console: Console, turns: int = TURNS) -> None:
    """Measures, and prints a table."""
    found = measure(turns)
    rows = []
    for side, all_turns in found.items():
        pairs = list(zip(all_turns, found[PLAIN], strict=True))
        added = [(mine.adding - plain.adding) / plain.micro_batch for mine, plain in pairs]
        whole = [mine.micro_batch_cpu / plain.micro_batch_cpu - 1 for mine, plain in pairs]
        judged = verdict(added, GOAL, at_most=True, form=".2%") if side == OURS else spread(added, ".2%")
        rows.append([side, spread([turn.adding * 1000 for turn in all_turns], ".1f"),
                     spread([turn.micro_batch for turn in all_turns], ".2f"),
                     *(("", "") if side == PLAIN else (judged, spread(whole, ".1%")))])
    print_table(console, f"covey accumulation, {date.today()}: ResNet-50, micro-batches of {BATCH} images of "
                f"{PIXELS} x {PIXELS} in float32 on one core, {turns} turns",
                ("side", "adding gradients, ms", "micro-batch, s",
                 f"more than plain adding, of a micro-batch, goal {GOAL:.0%}",
                 "whole micro-batch, processor time, more"), rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=TURNS)
    compare(wide_console(), parser.parse_args().turns)
