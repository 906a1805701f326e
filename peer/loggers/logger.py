"""What records a run: the figures of every collaborative epoch, under names that all loggers share. No torch.

samples_total, samples_per_second, loss (nats), learning_rate, the objective's metrics (prototype_entropy, ...), and
where the model was evaluated knn_accuracy, top1_accuracy, ...: ratios are 0 to 1.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from coordinator.ports import free_port
from training.errors import BadInput

LOGGERS = ("csv", "prometheus", "tensorboard", "wandb")  # modules of peer/loggers, each with an `open_logger(run)`
EXTRAS = ("tensorboard", "wandb")  # that need a package of the same name
METRICS_HOST = "127.0.0.1"


@dataclass(frozen=True)
class Run:
    """What a logger may want to know of the run that it records."""

    directory: Path                # the run's own folder
    run_id: str
    epoch: int                     # resumed at; 0 for a fresh start
    experiment: Mapping[str, Any]  # plain data
    metrics_port: int              # for Prometheus to scrape; 0 for any free one


class Logger(Protocol):
    """Is told the figures of every epoch, once, in order; a run that was resumed may tell some anew."""

    where: str
    """What keeps the record, for people: a path, or an address."""

    def update(self, values: Mapping[str, float], epoch: int) -> None:
        """`values` by name, at the end of `epoch`; which names there are may change."""

    def close(self) -> None:
        """Nothing more comes."""


def check_loggers(names: Sequence[str], metrics_port: int) -> None:
    """Raises BadInput unless all of `names` are loggers whose packages are installed, and the port can be had."""
    for name in names:
        if name not in LOGGERS:
            raise BadInput(f"logger {name!r}", expected=f"some of {', '.join(LOGGERS)}", mend="Change --log.")
        if name in EXTRAS and find_spec(name) is None:
            raise BadInput(f"--log {name} without the package {name}", expected="it installed",
                           mend=f"pip install 'covey[{name}]'")
    if "prometheus" in names:
        free_port(METRICS_HOST, metrics_port, "metrics")


@contextmanager
def open_loggers(names: Sequence[str], run: Run) -> Iterator[list[Logger]]:
    """The loggers `names`, closed at the end, however it comes. Raises BadInput."""
    check_loggers(names, run.metrics_port)
    with ExitStack() as stack:
        loggers: list[Logger] = []
        for name in dict.fromkeys(names):
            logger: Logger = import_module(f"peer.loggers.{name}").open_logger(run)
            stack.callback(logger.close)
            loggers.append(logger)
        yield loggers
