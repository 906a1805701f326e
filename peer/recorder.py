"""metrics.csv of a volunteer, from its worker's events. Imports no torch."""

import logging
from pathlib import Path

from peer.loggers.csv import NAME, CsvLogger, read_rows
from peer.progress import Tally
from proto.peer_pb2 import PeerStatus, WorkerEvent
from training.errors import BadInput

log = logging.getLogger(__name__)


class Recorder:
    """Observes a supervisor (peer/supervisor.py): a row per epoch in `directory`, over restarts too.

    samples_total, samples_per_second and loss are this peer's own; swarm_samples, peers and group_size are those of
    the update. What can't be written is logged once, and training goes on. Raises BadInput, at the start only, if
    there is a metrics.csv that is none of covey's.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / NAME
        rows = read_rows(path) if path.exists() else []
        self._csv, self._tally = CsvLogger(path), Tally()
        self._samples = int(rows[-1].get("samples_total", 0)) if rows else 0
        self._values: dict[str, float] = {}  # of the last row
        self._epoch = -1  # likewise
        self._failed = False

    def event(self, event: WorkerEvent, status: PeerStatus) -> None:
        """See peer.supervisor.Observer."""
        match event.WhichOneof("event"):
            case "started":
                self._tally.start(event.started.epoch)
            case "step":
                self._step(status)
            case "state_loaded":
                self._tally.begin(event.state_loaded.epoch)
            case "evaluated":
                epoch = event.evaluated.epoch
                known = self._values if epoch == self._epoch else {}  # none, after a download that passed over epochs
                self._write({**known, **event.evaluated.figures}, epoch)

    def restarting(self, exit_code: int, delay_seconds: float, status: PeerStatus) -> None:
        """See peer.supervisor.Observer."""

    def _step(self, status: PeerStatus) -> None:
        if ended := self._tally.step(status):
            self._samples += ended.own_samples
            self._values = {
                "samples_total": self._samples, "samples_per_second": ended.samples_per_second,
                "learning_rate": status.step.learning_rate, "loss": ended.loss, **status.step.metrics,
                "swarm_samples": ended.samples, "peers": ended.peers, "group_size": ended.group_size}
            self._epoch = ended.epoch
            self._write(self._values, ended.epoch)

    def _write(self, values: dict[str, float], epoch: int) -> None:
        try:
            self._csv.update(values, epoch)
        except (OSError, BadInput) as error:
            if not self._failed:
                log.warning("epoch %d is not recorded: %s", epoch, error)
            self._failed = True
