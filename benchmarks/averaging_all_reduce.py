"""`python -m benchmarks.averaging_all_reduce`: the mean of ResNet-50's parameters, ours beside hivemind's and gloo's.

25.56 M float32 on loopback, peers in processes of one thread. A turn is timed from the word to begin until the last
peer has the mean in its tensors. hivemind's averagers have found their group before that; ours find theirs, agree that
the round is complete, and copy the tensors into shared memory and the mean out of it, within that time.
"""

import averaging.fork  # noqa: F401

# isort: split
import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import date, timedelta
from time import monotonic, sleep

import torch
from hivemind.averaging import DecentralizedAverager
from hivemind.averaging.control import AveragingStage
from rich.console import Console
from torch import distributed

from averaging.config import Averaging
from benchmarks.averaging_lanes import STOCK, join
from benchmarks.averaging_peers import Child, Place, forked, introduce, start_node
from benchmarks.averaging_tables import print_table, spread, wide_console

VALUES, TENSORS = 25_557_032, 161  # ResNet-50's
TURNS = 4
TIMEOUT_SECONDS = 30.0
Prepare = Callable[[], Callable[[], object]]  # gets ready for a turn; what it returns averages


def _ours(place: Place, peers: int, tensors: list[torch.Tensor]) -> Prepare:
    _, swarm, _ = join(place, Averaging(
        target_batch_size=1000, target_group_size=peers, averaging_timeout=TIMEOUT_SECONDS, min_refresh_period=0.2,
        default_refresh_period=0.2))
    turn = 0

    def average() -> None:
        nonlocal turn
        outcome = swarm.meet(tensors, 1.0, kind="bench", epoch=turn, group=swarm.members(turn)).result()
        assert outcome.averaged, outcome
        turn += 1

    def prepare() -> Callable[[], object]:
        swarm.report(turn, 0)
        while len(swarm.members(turn)) < peers:
            sleep(0.02)
        return average

    return prepare


def _stock(place: Place, peers: int, tensors: list[torch.Tensor]) -> Prepare:
    averager = DecentralizedAverager(
        tensors, start_node(place), start=True, prefix="bench", target_group_size=peers,
        min_matchmaking_time=2.0, request_timeout=1.0, allreduce_timeout=TIMEOUT_SECONDS, next_chunk_timeout=10.0)

    def prepare() -> Callable[[], object]:
        control = averager.step(wait=False, require_trigger=True, timeout=TIMEOUT_SECONDS)
        while control.stage != AveragingStage.AWAITING_TRIGGER:
            sleep(0.02)

        def average() -> None:
            control.allow_allreduce()
            assert len(control.result(TIMEOUT_SECONDS)) == peers

        return average

    return prepare


def _gloo(place: Place, peers: int, tensors: list[torch.Tensor]) -> Prepare:
    distributed.init_process_group("gloo", init_method=f"file://{place.folder / 'gloo'}", rank=place.number,
                                   world_size=peers, timeout=timedelta(seconds=TIMEOUT_SECONDS))
    flat = torch.cat([tensor.flatten() for tensor in tensors])  # in one call it is fastest

    def average() -> None:
        distributed.all_reduce(flat)
        flat.div_(peers)

    return lambda: average


SIDES = {"covey": _ours, STOCK: _stock, "gloo": _gloo}


def _live(place: Place, side: str, peers: int) -> None:
    tensors = [torch.full((VALUES // TENSORS,), float(place.number)) for _ in range(TENSORS)]
    prepare = SIDES[side](place, peers, tensors)
    pipe = place.pipe
    pipe.send("ready")
    while True:
        pipe.recv()
        average = prepare()
        pipe.send("prepared")
        pipe.recv()
        average()
        pipe.send(monotonic())


def turn(children: Sequence[Child]) -> float:
    """Seconds of one all-reduce."""
    for word in ("prepare", "average"):
        for child in children:
            child.pipe.send(word)
        started = monotonic()
        heard = [child.hear(2 * TIMEOUT_SECONDS) for child in children]
    ended: float = max(heard)
    return ended - started


def measure(peers: int, turns: int) -> dict[str, list[float]]:
    """Seconds of every side in every turn, after one to warm up; the sides take turns."""
    with ExitStack() as stack:
        sides = {side: stack.enter_context(forked(peers, _live, side, peers)) for side in SIDES}
        for side, children in sides.items():
            if side == "gloo":
                assert all(child.hear() == "ready" for child in children)
            else:
                introduce(children)
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(turns + 1):
            for side, children in sides.items():
                seconds[side].append(turn(children))
    return {side: found[1:] for side, found in seconds.items()}


def compare(console: Console, turns: int = TURNS) -> None:
    """Measures, and prints a table."""
    rows = []
    for peers in (2, 4):
        seconds = measure(peers, turns)
        ratios = [spread([mine / other for mine, other in zip(seconds["covey"], seconds[rival], strict=True)], ".2f")
                  for rival in (STOCK, "gloo")]
        rows.append([str(peers), *(spread(seconds[side]) for side in SIDES), *ratios])
    print_table(console, f"covey all-reduce, {date.today()}: seconds for ResNet-50's {VALUES / 1e6:.2f} M float32, "
                f"loopback, {turns} turns", ("peers", *SIDES, f"covey / {STOCK}", "covey / gloo"), rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=TURNS)
    compare(wide_console(), parser.parse_args().turns)
