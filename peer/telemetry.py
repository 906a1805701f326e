"""What the worker tells: events to its daemon, a signed record to the DHT. Training waits for neither."""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from threading import Event, Lock, Thread
from typing import Any

from hivemind.utils import get_dht_time
from hivemind.utils.crypto import RSAPrivateKey

from averaging.dht import DHT
from averaging.progress import publish_record, read_records
from averaging.records import PeerRecord, Rounds
from averaging.strategies.collaborative import StateLoad
from averaging.transports.swarm import Round
from averaging.version import VERSION
from peer.events import EventWriter
from peer.job import Job
from peer.known_peers import remember_peers
from proto.peer_pb2 import WorkerEvent
from training.data.sources import Source
from training.loop import StepReport
from training.objectives.objective import Objective

PUBLISH_SECONDS = 2.0
STEP_SECONDS = 0.1  # between two Step events, but for those that end an epoch
REMEMBER_EVERY = 10  # publications, between two notes of who else is there
log = logging.getLogger(__name__)


class Telemetry:
    """Turns what happens in the worker into WorkerEvents and into this peer's record in the DHT.

    A thread publishes the record every PUBLISH_SECONDS, and ends the whole worker when a child that it needs is
    gone: the main thread may be waiting for that child's answer, and the daemon starts a new worker.
    """

    def __init__(self, events: EventWriter, dht: DHT, job: Job, key: RSAPrivateKey, *, device: str,
                 lifetime_seconds: float) -> None:
        self._events, self._lock = events, Lock()
        self._record = PeerRecord(
            peer_id=str(dht.peer_id), name=job.config.name, state="starting", epoch=0, samples_accumulated=0,
            samples_total=0, samples_per_second=0.0, loss=None, group_size=0, version=VERSION, device=device,
            client_mode=job.config.client_mode, time=get_dht_time(),
            addresses=() if job.config.client_mode else tuple(map(str, dht.get_visible_maddrs()))[:8])
        self._epoch_losses: list[float] = []
        self._sent = 0.0  # when the last Step event went, by the monotonic clock
        self._others = partial(read_records, dht, job.run_id)
        self._known_peers = job.config.known_peers
        self._publish = partial(publish_record, dht, job.run_id, key, lifetime_seconds=lifetime_seconds)
        self._vital: list[Callable[[], bool]] = [lambda: dht.is_serving]
        self._closing = Event()
        self._thread = Thread(target=self._keep_publishing, name="telemetry", daemon=True)
        self._thread.start()

    def watch(self, is_alive: Callable[[], bool]) -> None:
        """End this process as soon as `is_alive` is false."""
        self._vital.append(is_alive)

    def started(self, objective: Objective, source: Source, epoch: int) -> None:
        """The model is built, the data open, the swarm joined."""
        self._source, self._skipped = source, 0
        self._update(epoch=epoch)
        self._events.send(WorkerEvent(started=WorkerEvent.Started(
            peer_id=self._record.peer_id, device=self._record.device, images=len(source), epoch=epoch,
            parameters=sum(parameter.numel() for parameter in objective.parameters()))))

    def step(self, report: StepReport) -> None:
        """After every micro-batch."""
        if report.updated or time.monotonic() - self._sent >= STEP_SECONDS:
            self._sent = time.monotonic()
            self._send_step(report)
            self._tell_skipped()
        self._epoch_losses.append(report.loss)
        loss = self._record.loss
        if report.epoch != self._record.epoch:
            loss = sum(self._epoch_losses) / len(self._epoch_losses)
            self._epoch_losses.clear()
        self._update(state="training", epoch=report.epoch, samples_accumulated=report.samples_accumulated, loss=loss,
                     samples_total=report.samples_total, samples_per_second=report.samples_per_second)

    def _send_step(self, report: StepReport) -> None:
        self._events.send(WorkerEvent(step=WorkerEvent.Step(
            epoch=report.epoch, local_step=report.local_step, samples_total=report.samples_total,
            samples_accumulated=report.samples_accumulated, swarm_samples=report.swarm_samples,
            swarm_peers=report.swarm_peers, samples_per_second=report.samples_per_second, loss=report.loss,
            metrics=report.metrics, learning_rate=report.learning_rate)))

    def _tell_skipped(self) -> None:
        told = self._skipped
        self._skipped = len(self._source.skipped)
        for number, path in enumerate(list(self._source.skipped.values())[told:self._skipped], start=told + 1):
            self._events.send(WorkerEvent(skipped=WorkerEvent.Skipped(path=path, total=number)))

    def round(self, ended: Round) -> None:
        """After every averaging round; from any thread."""
        self._events.send(WorkerEvent(round=WorkerEvent.Round(
            kind=ended.kind, outcome=ended.outcome, group_size=ended.group_size, seconds=ended.seconds,
            epoch=ended.epoch)))
        field = "gradient_rounds" if ended.kind == "gradients" else "state_rounds"
        with self._lock:
            counts: Rounds = getattr(self._record, field)
            counts = replace(counts, **{ended.outcome: getattr(counts, ended.outcome) + 1})
            changed: dict[str, Any] = {field: counts, "group_size": ended.group_size}
            self._record = replace(self._record, **changed)

    def state_load(self, load: StateLoad) -> None:
        """After every try to download the swarm's state."""
        self._events.send(WorkerEvent(state_loaded=WorkerEvent.StateLoaded(
            epoch=load.epoch, seconds=load.seconds, succeeded=load.succeeded)))

    def evaluated(self, epoch: int, figures: dict[str, float]) -> None:
        """After every evaluation."""
        self._events.send(WorkerEvent(evaluated=WorkerEvent.Evaluated(epoch=epoch, figures=figures)))

    def checkpointed(self, path: str, epoch: int) -> None:
        """After every checkpoint."""
        self._events.send(WorkerEvent(checkpointed=WorkerEvent.Checkpointed(
            path=path, epoch=epoch, time_seconds=time.time())))

    def leaving(self) -> None:
        """Tell the swarm at once."""
        self._closing.set()
        self._thread.join()
        self._update(state="leaving")
        self._publish(replace(self._record, time=get_dht_time()))

    def _update(self, **fields: Any) -> None:
        with self._lock:
            self._record = replace(self._record, **fields)

    def _keep_publishing(self) -> None:
        published = 0
        while not self._closing.wait(PUBLISH_SECONDS):
            with self._lock:
                record = self._record
            try:
                if all(is_alive() for is_alive in self._vital):
                    self._publish(replace(record, time=get_dht_time()))
                    published += 1
                    if published % REMEMBER_EVERY == 3:
                        self._remember_others()
                    continue
            except OSError:  # the pipe to the DHT's process broke just now
                pass
            log.error("a process of this worker is gone: ending it, to be started anew")
            os._exit(1)

    def _remember_others(self) -> None:
        try:
            remember_peers(self._known_peers, [address for other in self._others() for address in other.addresses
                                               if other.peer_id != self._record.peer_id])
        except (TimeoutError, OSError) as error:  # a slow DHT or a full disk: training goes on
            log.warning("other peers' addresses are not noted: %r", error)
