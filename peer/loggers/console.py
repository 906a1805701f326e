"""What `covey train` prints: lines and a progress bar for people, JSON lines for programs."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from time import monotonic
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from peer.progress import ACCURACIES, Printer, accuracies

SHORTEST_SECONDS, LONGEST_SECONDS = 2.0, 60.0  # between two lines about epochs, more the longer a run lasts


class Teller(Protocol):
    """A logger that also tells what happens besides epochs."""

    def update(self, values: Mapping[str, float], epoch: int) -> None:
        """See peer.loggers.logger.Logger."""

    def moment(self, epoch: int, samples: int, samples_per_second: float, loss: float) -> None:
        """A micro-batch of the update after `epoch`, towards which there are `samples`, is done."""

    def tell(self, event: str, **fields: Any) -> None:
        """Something happened: record, warning, resumed, ready, checkpoint, leaving, finished."""


class Silent:
    """Tells nothing: of several processes, one is enough."""

    def update(self, values: Mapping[str, float], epoch: int) -> None:
        pass

    def moment(self, epoch: int, samples: int, samples_per_second: float, loss: float) -> None:
        pass

    def tell(self, event: str, **fields: Any) -> None:
        pass


class JsonLines:
    """One JSON object per line, each with an "event"."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write

    def update(self, values: Mapping[str, float], epoch: int) -> None:
        self.tell("epoch", epoch=epoch, **values)

    def moment(self, epoch: int, samples: int, samples_per_second: float, loss: float) -> None:
        pass  # too many for a pipe

    def tell(self, event: str, **fields: Any) -> None:
        self._write(json.dumps({"event": event, **fields}))


class Lines:
    """For people: what happens by `write`, the moment by `now`, which takes an epoch and words."""

    def __init__(self, write: Callable[[str], None], now: Callable[[int, str], None], *, epochs: int,
                 clock: Callable[[], float] = monotonic) -> None:
        self._write, self._now, self._epochs, self._clock = write, now, epochs, clock
        self._started, self._next_line = clock(), 0.0

    def update(self, values: Mapping[str, float], epoch: int) -> None:
        now = self._clock()
        if now >= self._next_line or epoch == self._epochs or values.keys() & ACCURACIES.keys():
            self._next_line = now + min(LONGEST_SECONDS, max(SHORTEST_SECONDS, 0.02 * (now - self._started)))
            self._write(epoch_line(values, epoch))

    def moment(self, epoch: int, samples: int, samples_per_second: float, loss: float) -> None:
        self._now(epoch, f"loss {loss:.4f}, {samples_per_second:,.1f} images/s, {samples:,} images towards the next")

    def tell(self, event: str, **fields: Any) -> None:
        words = {
            "ready": "training on {device}: {parameters:,} parameters, {images:,} images, epochs {epoch} to {epochs}",
            "resumed": "going on from {checkpoint}", "warning": "{message}", "record": "{logger}: {where}",
            "leaving": "leaving in good order; Ctrl-C again leaves at once",
            "finished": "epoch {epoch} of {epochs} after {seconds:.0f} s; checkpoint {checkpoint}"}
        if event in words:
            self._write(words[event].format(**fields))
        if event == "finished" and (found := accuracies(fields)):
            self._write(f"on the validation images: {found}")


def epoch_line(values: Mapping[str, float], epoch: int) -> str:
    """An epoch that ended, in columns."""
    return " ".join([f"epoch {epoch:>6,}  loss {values['loss']:7.4f}  lr {values['learning_rate']:.2e}",
                     f"{values['samples_per_second']:9,.1f} images/s ", accuracies(values)]).rstrip()


@contextmanager
def console(as_json: bool, epoch: int, epochs: int) -> Iterator[Teller]:
    """Prints to stdout: JSON lines, or for people, with a bar from `epoch` on to `epochs` on a terminal."""
    screen = Console(highlight=False)
    live = screen.is_terminal and not as_json
    printer = Printer((lambda line: screen.print(Text(line))) if live else partial(print, flush=True))
    try:
        if as_json:
            yield JsonLines(printer.line)
        elif not live:
            yield Lines(printer.line, lambda epoch, words: None, epochs=epochs)
        else:
            with Progress(TextColumn("epoch"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(),
                          TextColumn("{task.description}", markup=False), console=screen, transient=True) as bar:
                task = bar.add_task("", completed=epoch, total=epochs)
                yield Lines(printer.line, lambda epoch, words: bar.update(task, completed=epoch, description=words),
                            epochs=epochs)
    finally:
        printer.close()
