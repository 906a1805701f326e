"""What `covey join` shows: a line per collaborative epoch and one for the moment, or JSON lines for programs."""

import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rich.console import Console
from rich.text import Text

from peer.plain import plain
from proto.peer_pb2 import PeerStatus, WorkerEvent
from proto.swarm_pb2 import RoundCounts

NO_DEVICE = "none"  # an auxiliary peer's: it trains nothing
ACCURACIES = {"knn_accuracy": "k-NN", "top1_accuracy": "top-1", "top5_accuracy": "top-5"}


class Printer:
    """Prints from a thread of its own: a terminal or a pipe that nobody reads must not hold up the daemon.

    Lines that find a thousand others waiting are dropped, and all of them once the reader is gone.
    """

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._lines: queue.Queue[str | None] = queue.Queue(maxsize=1000)
        self._thread = threading.Thread(target=self._print, name="printer", daemon=True)
        self._thread.start()

    def line(self, text: str) -> None:
        """Print `text` soon; returns at once."""
        with suppress(queue.Full):
            self._lines.put_nowait(text)

    def close(self, timeout_seconds: float = 2.0) -> None:
        """Wait until all is printed, or nobody reads."""
        if self._thread.is_alive():
            with suppress(queue.Full):
                self._lines.put(None, timeout=timeout_seconds)
                self._thread.join(timeout_seconds)

    def _print(self) -> None:
        while (text := self._lines.get()) is not None:
            try:
                self._show(text)
            except OSError:  # the reader is gone: nor may the interpreter's last flush fail
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return


@dataclass(frozen=True)
class Epoch:
    """A collaborative epoch that ended, as this peer saw it."""

    epoch: int  # updates of the swarm, this one included
    own_samples: int  # this peer's, towards this update
    samples: int  # the swarm's, towards this update
    peers: int
    group_size: int
    loss: float  # mean of this peer's micro-batches
    samples_per_second: float  # this peer's


class Tally:
    """Gathers Step events into epochs."""

    def __init__(self) -> None:
        self.start(0)

    def start(self, epoch: int) -> None:
        """A worker has started, at `epoch`, and counts its samples from 0."""
        self._samples_total = 0
        self.begin(epoch)

    def begin(self, epoch: int) -> None:
        """Steps from now on count towards the update after `epoch`, which was reached or downloaded."""
        self._epoch, self._samples, self._own_samples, self._losses = epoch, 0, 0, list[float]()

    def step(self, status: PeerStatus) -> Epoch | None:
        """The epoch that the last step ended, if it did. A step that ends one counts towards it."""
        step = status.step
        self._losses.append(step.loss)
        self._own_samples += step.samples_total - self._samples_total
        self._samples_total = step.samples_total
        self._samples = max(self._samples, step.swarm_samples)
        if step.epoch <= self._epoch:
            return None
        ended = Epoch(step.epoch, self._own_samples, self._samples, step.swarm_peers, status.group_size,
                      sum(self._losses) / len(self._losses), step.samples_per_second)
        self.begin(step.epoch)
        return ended


class JsonLines:
    """Observes a supervisor; one JSON object per line, each with an "event"."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self._tally = write, Tally()

    def event(self, event: WorkerEvent, status: PeerStatus) -> None:
        """See peer.supervisor.Observer. Epochs stand for the steps, which are too many."""
        match event.WhichOneof("event"):
            case "started":
                self._tally.start(event.started.epoch)
                self._put("ready", event.started, daemon_pid=status.daemon_pid, worker_pid=status.worker_pid,
                          metrics_url=status.metrics_url)
            case "step":
                if ended := self._tally.step(status):
                    self._write(json.dumps({"event": "epoch", **asdict(ended)}))
            case "round":
                self._put("round", event.round)
            case "state_loaded":
                self._tally.begin(event.state_loaded.epoch)
                self._put("state_loaded", event.state_loaded)
            case "evaluated":
                self._put("evaluated", event.evaluated)
            case "checkpointed":
                self._put("checkpoint", event.checkpointed)
            case "skipped":
                self._put("skipped", event.skipped)
            case "finished":
                self._put("finished", event.finished, rounds=plain(status.rounds))

    def restarting(self, exit_code: int, delay_seconds: float, status: PeerStatus) -> None:
        """See peer.supervisor.Observer."""
        self._write(json.dumps({"event": "restarting", "exit_code": exit_code, "delay_seconds": delay_seconds}))

    def _put(self, name: str, message: Any, **more: Any) -> None:
        self._write(json.dumps({"event": name, **plain(message), **more}))


class Lines:
    """Observes a supervisor; lines for people: changes by `write`, the moment by `now` (a terminal's last line)."""

    def __init__(self, write: Callable[[str], None], now: Callable[[str], None]) -> None:
        self._write, self._now, self._tally = write, now, Tally()

    def event(self, event: WorkerEvent, status: PeerStatus) -> None:
        """See peer.supervisor.Observer."""
        match event.WhichOneof("event"):
            case "started":
                self._tally.start(event.started.epoch)
                self._started(event.started)
            case "step":
                if ended := self._tally.step(status):
                    self._write(epoch_line(ended))
                self._now(step_line(status))
            case "state_loaded":
                loaded = event.state_loaded
                self._tally.begin(loaded.epoch)
                if loaded.succeeded:
                    self._write(f"downloaded the swarm's state of epoch {loaded.epoch} in {loaded.seconds:.1f} s")
            case "evaluated":
                self._write(f"epoch {event.evaluated.epoch:>5} on the validation images: "
                            f"{accuracies(event.evaluated.figures)}")
            case "skipped":
                self._write(f"passed over {event.skipped.path}, which can't be read ({event.skipped.total} so far)")
            case "finished":
                self._finished(event.finished, status)

    def restarting(self, exit_code: int, delay_seconds: float, status: PeerStatus) -> None:
        """See peer.supervisor.Observer."""
        self._write(f"the worker failed (exit code {exit_code}); starting it again in {delay_seconds:g} s; "
                    f"its log is {status.state_dir}/worker.log")

    def _started(self, started: WorkerEvent.Started) -> None:
        if started.device == NO_DEVICE:
            self._write("helping others to average")
            return
        self._write(f"training on {started.device}: {started.parameters:,} parameters, {started.images:,} images, "
                    f"from epoch {started.epoch}")

    def _finished(self, finished: WorkerEvent.Finished, status: PeerStatus) -> None:
        self._write(f"left at epoch {finished.epoch}; averaging rounds: {counts(status.rounds)}")
        self._write(f"checkpoint {finished.checkpoint}\nparameters {finished.parameters_checksum}")


def epoch_line(ended: Epoch) -> str:
    """An epoch that ended, in columns; within 80 in all."""
    return (f"epoch {ended.epoch:>5} {ended.samples:>6,} samples {ended.peers:>3} peers  group {ended.group_size:>2}  "
            f"loss {ended.loss:7.4f} {ended.samples_per_second:8.1f} samples/s")


def step_line(status: PeerStatus) -> str:
    """The moment, in short."""
    step = status.step
    return (f"epoch {step.epoch}: {step.swarm_samples:,} samples of the swarm, {step.swarm_peers} peers, "
            f"loss {step.loss:.4f}, {step.samples_per_second:.1f} samples/s here")


def accuracies(figures: Mapping[str, float]) -> str:
    """Those of `figures` that are shares of images, in words."""
    return ", ".join(f"{name} {figures[key]:.1%}" for key, name in ACCURACIES.items() if key in figures)


def counts(rounds: RoundCounts) -> str:
    """Rounds by outcome, in words."""
    return f"{rounds.averaged} averaged, {rounds.failed} failed, {rounds.alone} alone"


@contextmanager
def progress(as_json: bool) -> Iterator[JsonLines | Lines]:
    """An observer that prints to stdout: JSON lines, or for people, with a line for the moment on a terminal."""
    console = Console(highlight=False)
    printer = Printer(partial(print, flush=True) if as_json or not console.is_terminal else
                      lambda line: console.print(Text(line)))
    try:
        if as_json:
            yield JsonLines(printer.line)
        elif console.is_terminal:
            with console.status("joining") as now:
                yield Lines(printer.line, lambda line: now.update(Text(line)))
        else:
            yield Lines(printer.line, lambda line: None)
    finally:
        printer.close()
