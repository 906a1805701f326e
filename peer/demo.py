"""`covey demo`: a coordinator and two volunteers on this machine, as real processes, from start to summary."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

from rich.console import Console
from rich.table import Table

from averaging.experiment import Experiment, load_experiment
from averaging.process import die_with_parent
from training.errors import BadInput
from training.optimizers.schedule import total_updates

VOLUNTEERS = ("ada", "grace")
START_SECONDS = 120.0  # until the coordinator has printed its link
TRAIN_SECONDS = 900.0  # a machine that takes longer is too slow for this recipe
LEAVE_SECONDS = 12.0
MOST_RESTARTS = 3  # of one volunteer's worker: one may be killed to see what happens

Row = dict[str, Any]


@dataclass
class Seen:
    """What a volunteer's JSON lines have told."""

    group_sizes: list[int] = field(default_factory=list)  # of gradient rounds that averaged
    finished: Row | None = None
    restarts: int = 0  # of its worker


class Failed(Exception):
    """The demo can't be what it should: one line, exit code 1."""


async def run_demo(overrides: Sequence[str], *, epochs: int | None, state_dir: Path) -> int:
    """Train the recipe "demo" with `overrides` for `epochs` collaborative epochs (None: its max_epochs); the exit code.

    0 only if both volunteers averaged in groups of two and end with equal parameters. Whatever it starts ends
    with it, however it ends.
    """
    console, experiment = Console(highlight=False), load_experiment("demo", overrides)
    epochs = epochs or total_updates(experiment.optimizer, batch_size=experiment.averaging.target_batch_size,
                                     images_per_pass=experiment.data.images_per_pass)
    if experiment.data.dataset != "synthetic":
        raise BadInput(f"data.dataset = {experiment.data.dataset!r} for the demo", expected="synthetic, which it makes "
                       "on the spot", mend="For images of your own, `covey coordinator` and `covey join --data DIR`.")
    _require_empty(state_dir)
    interrupted = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, interrupted.set)
    try:
        async with AsyncExitStack() as stack:
            training = asyncio.ensure_future(_train(stack, console, overrides, epochs, state_dir))
            stop = asyncio.ensure_future(interrupted.wait())
            await asyncio.wait({training, stop}, return_when=asyncio.FIRST_COMPLETED, timeout=TRAIN_SECONDS)
            stop.cancel()
            if not training.done():
                training.cancel()
                raise Failed("interrupted" if interrupted.is_set() else f"not done after {TRAIN_SECONDS:.0f} s")
            seen = await training
    except Failed as failure:
        console.print(f"[red]covey demo: {failure}[/]; the logs are in {state_dir}", soft_wrap=True)
        return 130 if interrupted.is_set() else 1
    return _summary(console, experiment, seen, epochs)


def _require_empty(state_dir: Path) -> None:
    if state_dir.exists() and any(state_dir.iterdir()):
        raise BadInput(f"state directory {state_dir} is not empty", expected="a new one for every demo",
                       mend="Choose another with --state-dir, or leave it out.")


async def _train(stack: AsyncExitStack, console: Console, overrides: Sequence[str], epochs: int,
                 state_dir: Path) -> dict[str, Seen]:
    began = monotonic()
    console.print("starting a coordinator …")
    coordinator = await stack.enter_async_context(_process(
        ["coordinator", "demo", *overrides, "--archive-every-epochs", "0", *_local_ports("--grpc-port"),
         "--state-dir", str(state_dir / "coordinator")], state_dir / "coordinator.log"))
    ready = await _first(coordinator, "ready")
    console.print(f"status page {ready['dashboard_url']}\nmetrics     {ready['metrics_url']}\n"
                  f"join link   {ready['link']}\nstarting {len(VOLUNTEERS)} volunteers …", soft_wrap=True)
    seen, rows = {name: Seen() for name in VOLUNTEERS}, _Rows(console, epochs, began)
    volunteers = [await stack.enter_async_context(_process(
        ["join", ready["link"], "--name", name, "--threads", "1", "--batch-size", "256", *_local_ports(),
         "--stop-at-epoch", str(epochs), "--state-dir", str(state_dir / name)], state_dir / f"{name}.log"))
        for name in VOLUNTEERS]
    async with asyncio.TaskGroup() as group:
        for name, process in zip(VOLUNTEERS, volunteers, strict=True):
            group.create_task(_follow(name, process, seen[name], rows, console))
    return seen


def _local_ports(*more: str) -> list[str]:
    return ["--listen", "127.0.0.1", "--json", *(word for flag in ("--port", "--http-port", *more)
                                                 for word in (flag, "0"))]


@asynccontextmanager
async def _process(arguments: Sequence[str], log: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """`covey ARGUMENTS`, errors to `log`; in a session of its own, so that Ctrl-C reaches it through us alone."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "peer.cli", *arguments, stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=errors, start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid()))
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), LEAVE_SECONDS)
            except TimeoutError:
                process.kill()
                await process.wait()


async def _events(process: asyncio.subprocess.Process) -> AsyncIterator[Row]:
    assert process.stdout is not None
    async for line in process.stdout:
        if line.startswith(b"{"):
            yield json.loads(line)


async def _first(process: asyncio.subprocess.Process, name: str) -> Row:
    async with asyncio.timeout(START_SECONDS):
        async for event in _events(process):
            if event["event"] == name:
                return event
    raise Failed("the coordinator did not start")


async def _follow(name: str, process: asyncio.subprocess.Process, seen: Seen, rows: "_Rows",
                  console: Console) -> None:
    async for event in _events(process):
        match event["event"]:
            case "ready":
                console.print(f"{name}: {event['parameters']:,} parameters, {event['images']:,} images; "
                              f"metrics {event['metrics_url']}", soft_wrap=True)
            case "epoch":
                rows.add(name, event)
            case "round" if event["outcome"] == "averaged":
                seen.group_sizes.append(event["group_size"])
            case "restarting":
                seen.restarts += 1
                if seen.restarts == MOST_RESTARTS:
                    raise Failed(f"the worker of volunteer {name} failed {seen.restarts} times")
            case "finished":
                seen.finished = event
    if await process.wait() != 0 or seen.finished is None:
        raise Failed(f"volunteer {name} ended with exit code {process.returncode}")


class _Rows:
    """A line per collaborative epoch, printed once every volunteer has told of it or of a later one."""

    def __init__(self, console: Console, epochs: int, began: float) -> None:
        self._console, self._epochs, self._began = console, epochs, began
        self._told: dict[int, list[Row]] = {}
        self._latest = dict.fromkeys(VOLUNTEERS, 0)

    def add(self, name: str, row: Row) -> None:
        """`name` has told of `row`; an earlier one that it hasn't told of it passed by, downloading the state."""
        self._told.setdefault(row["epoch"], []).append(row)
        self._latest[name] = row["epoch"]
        for epoch in sorted(epoch for epoch in self._told if epoch <= min(self._latest.values())):
            self._print(epoch, self._told.pop(epoch))

    def _print(self, epoch: int, rows: list[Row]) -> None:
        self._console.print(
            f"epoch {epoch:>3}/{self._epochs}  {sum(row['own_samples'] for row in rows):>5} samples  "
            f"{len(rows)} peer{'s' * (len(rows) > 1)}  group of {max(row['group_size'] for row in rows)}  "
            f"loss {sum(row['loss'] for row in rows) / len(rows):6.4f}  "
            f"{sum(row['samples_per_second'] for row in rows):7.1f} samples/s  {monotonic() - self._began:5.0f} s",
            soft_wrap=True)


def _summary(console: Console, experiment: Experiment, seen: dict[str, Seen], epochs: int) -> int:
    finished = {name: one.finished or {} for name, one in seen.items()}
    checkpoint = Path(finished[VOLUNTEERS[0]]["checkpoint"])
    console.print("judging the backbone by k-NN …")
    table = Table(title="covey demo", show_header=False, title_justify="left")
    for meaning, accuracy in _accuracies(experiment, checkpoint).items():
        table.add_row(f"k-NN accuracy, {meaning}", f"{accuracy:.1%}")
    for name, end in finished.items():
        table.add_row(f"{name}: averaging rounds", _rounds(end["rounds"]))
        table.add_row(f"{name}: parameters", end["parameters_checksum"][:16])
    console.print(table)
    console.print(f"checkpoint {checkpoint}", soft_wrap=True)
    return _verdict(console, seen, epochs)


def _accuracies(experiment: Experiment, checkpoint: Path) -> dict[str, float]:
    from training.checkpoint import load_into, read_checkpoint  # noqa: PLC0415 - torch, once the swarm has ended
    from training.data.open import open_source  # noqa: PLC0415
    from training.evaluation import evaluate_backbone, evaluate_pixels  # noqa: PLC0415
    from training.objectives.objective import build_objective  # noqa: PLC0415
    train, val = (open_source(experiment.data, None, split) for split in ("train", "val"))
    objective = build_objective(experiment)
    pixels = evaluate_pixels(train, val, experiment.evaluation)
    untrained = evaluate_backbone(objective.backbone, train, val, experiment.evaluation)
    load_into(read_checkpoint(checkpoint), objective)
    trained = evaluate_backbone(objective.backbone, train, val, experiment.evaluation)
    return {"trained together": trained["knn_accuracy"], "untrained": untrained["knn_accuracy"],
            "raw pixels": pixels["knn_accuracy"]}


def _rounds(counts: Row) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in counts.items())


def _verdict(console: Console, seen: dict[str, Seen], epochs: int) -> int:
    ends = [one.finished or {} for one in seen.values()]
    if len({(end["parameters_checksum"], end["epoch"]) for end in ends}) != 1:
        console.print("[red]the volunteers ended with different parameters[/]")
        return 1
    together = min(one.group_sizes.count(len(VOLUNTEERS)) for one in seen.values())
    if together < epochs / 2:
        console.print(f"[red]only {together} of {epochs} epochs were averaged by both volunteers[/]")
        return 1
    console.print(f"[green]{together} of {epochs} epochs averaged by both volunteers; their parameters are equal[/]")
    return 0
