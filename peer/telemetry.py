"""What the worker tells: events to its daemon, a signed record to the DHT. Training waits for neither."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event, Thread
from typing import Any, TypeVar

import torch

from averaging.bulletin import Bulletin
from averaging.known_peers import remember_peers
from averaging.records import PeerRecord, RoundEnd, Rounds, RoundSeconds, StateLoad
from peer.events import EventWriter
from proto.peer_pb2 import WorkerEvent
from training.data.sources import Source
from training.loop import StepReport
from training.objectives.objective import Objective

LOOK_SECONDS = 2.0
STEP_SECONDS = 0.1  # between two Step events, but for those that end an epoch
REMEMBER_EVERY = 10  # looks, between two notes of who else is there
Sums = TypeVar("Sums", Rounds, RoundSeconds)
log = logging.getLogger(__name__)


class Telemetry:
    """Turns what happens in the worker into WorkerEvents and into this peer's record in the DHT.

    A thread looks every LOOK_SECONDS, and ends the whole worker when a child that it needs is gone (`vital`): the main
    thread may be waiting for that child's answer, and the daemon starts a new worker.
    """

    def __init__(self, events: EventWriter, bulletin: Bulletin, known_peers: Path,
                 vital: Sequence[Callable[[], bool]]) -> None:
        self._events, self._bulletin = events, bulletin
        self._epoch_losses: list[float] = []
        self._sent = 0.0  # when the last Step event went, by the monotonic clock
        self._known_peers, self._vital = known_peers, vital
        self._closing = Event()
        self._thread = Thread(target=self._keep_watching, name="telemetry", daemon=True)
        self._thread.start()

    def started(self, objective: Objective, source: Source, epoch: int) -> None:
        """The model is built, the data open, the swarm joined."""
        self._source, self._skipped = source, 0
        record = self._bulletin.record
        self._events.send(WorkerEvent(started=WorkerEvent.Started(
            peer_id=record.peer_id, device=record.device, images=len(source), epoch=epoch,
            parameters=sum(parameter.numel() for parameter in objective.parameters()))))

    def helping(self) -> None:
        """This peer is auxiliary, and the swarm joined."""
        record = self._bulletin.record
        self._events.send(WorkerEvent(started=WorkerEvent.Started(peer_id=record.peer_id, device=record.device)))

    def step(self, report: StepReport) -> None:
        """After every micro-batch."""
        if report.updated or time.monotonic() - self._sent >= STEP_SECONDS:
            self._sent = time.monotonic()
            self._send_step(report)
            self._tell_skipped()
        self._epoch_losses.append(report.loss)
        loss = self._bulletin.record.loss
        if report.updated:
            loss = sum(self._epoch_losses) / len(self._epoch_losses)
            self._epoch_losses.clear()
        self._bulletin.update(state="training", loss=loss, samples_total=report.samples_total,
                              samples_per_second=report.samples_per_second)

    def _send_step(self, report: StepReport) -> None:
        self._events.send(WorkerEvent(step=WorkerEvent.Step(
            epoch=report.epoch, local_step=report.local_step, samples_total=report.samples_total,
            samples_accumulated=report.samples_accumulated, swarm_samples=report.swarm_samples,
            swarm_peers=report.swarm_peers, samples_per_second=report.samples_per_second, loss=report.loss,
            metrics={**report.metrics, **gpu_memory(self._bulletin.record.device)},
            learning_rate=report.learning_rate)))

    def _tell_skipped(self) -> None:
        told = self._skipped
        self._skipped = len(self._source.skipped)
        for number, path in enumerate(list(self._source.skipped.values())[told:self._skipped], start=told + 1):
            self._events.send(WorkerEvent(skipped=WorkerEvent.Skipped(path=path, total=number)))

    def round(self, ended: RoundEnd) -> None:
        """After every round of averaging."""
        self._events.send(WorkerEvent(round=WorkerEvent.Round(**asdict(ended))))
        self._bulletin.update(**after_round(self._bulletin.record, ended))

    def state_load(self, load: StateLoad) -> None:
        """After every try to download the swarm's state."""
        self._events.send(WorkerEvent(state_loaded=WorkerEvent.StateLoaded(
            epoch=load.epoch, seconds=load.seconds, succeeded=load.succeeded)))

    @contextmanager
    def resting(self) -> Iterator[None]:
        """While inside, the swarm is told that nothing is trained here."""
        speed = self._bulletin.record.samples_per_second
        self._bulletin.update(samples_per_second=0.0)
        yield
        self._bulletin.update(samples_per_second=speed)

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
        self._bulletin.update(state="leaving")

    def _keep_watching(self) -> None:
        looks = 0
        while not self._closing.wait(LOOK_SECONDS):
            if not all(is_alive() for is_alive in self._vital):
                log.error("a process of this worker is gone: ending it, to be started anew")
                os._exit(1)
            looks += 1
            if looks % REMEMBER_EVERY == 3:
                self._remember_others()

    def _remember_others(self) -> None:
        own = self._bulletin.record.peer_id
        try:
            remember_peers(self._known_peers, [address for record in self._bulletin.records()
                                               for address in record.addresses if record.peer_id != own])
        except OSError as error:  # a full disk: training goes on
            log.warning("other peers' addresses are not noted: %r", error)


def after_round(record: PeerRecord, ended: RoundEnd) -> dict[str, Any]:
    """What a round that `ended` changes in this peer's `record`."""
    told = {"group_size": ended.group_size, "rounds": _more(record.rounds, ended.outcome, 1),
            "refused": record.refused.plus(ended.refused)}
    if ended.outcome == "alone":  # nothing was averaged, in no time
        return told
    return {**told, "round_seconds": ended.seconds, "seconds": _more(record.seconds, ended.outcome, ended.seconds)}


def _more(sums: Sums, outcome: str, amount: float) -> Sums:
    return replace(sums, **{outcome: getattr(sums, outcome) + amount})


def gpu_memory(device: str) -> dict[str, float]:
    """What PyTorch holds here of the memory of `device`, in bytes; empty where that is no CUDA device."""
    return {"gpu_memory_used_bytes": torch.cuda.memory_reserved(device)} if device.startswith("cuda") else {}
