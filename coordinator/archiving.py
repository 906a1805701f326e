"""The coordinator's side of the archive: it decides what is pulled, keeps the archivist running, and tells newcomers.

The archivist, a process, does what takes time or memory; should it crash, it is started again, and the coordinator
goes on. It is started when there is a checkpoint to hand out, or a state to pull.
"""

import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

from averaging.backoff import Backoff
from averaging.experiment import Experiment, canonical, run_id
from averaging.pipe import framed, read_messages
from averaging.records import ARCHIVING, PeerRecord
from averaging.version import VERSION
from coordinator.archive import Archive, ArchiveOptions, Evaluation, with_evaluation
from coordinator.node import NAME, Node
from coordinator.pulls import settled_epoch, verdict, wanted, with_majority
from coordinator.swarm import SwarmState
from proto.archive_pb2 import ArchiveEvent, ArchiveOrder
from training.atomic import move_into_place

RETRY = Backoff(first_seconds=5.0, ceiling_seconds=300.0)  # of a pull
RESTART = Backoff(first_seconds=1.0, ceiling_seconds=300.0)  # of the archivist
log = logging.getLogger("covey.archive")


class Archiver:
    """Keeps `archive` true. One event loop uses it; `look` is called after every reading of the records.

    `folder`: the coordinator's state directory. `authority`: its public key. `clock` gives Unix seconds.
    """

    def __init__(self, options: ArchiveOptions, experiment: Experiment, authority: bytes, node: Node, folder: Path, *,
                 retry: Backoff = RETRY, clock: Callable[[], float] = time.time) -> None:
        self._options, self._experiment, self._authority = options, experiment, authority
        self._node, self._folder, self._retry, self._clock = node, folder, retry, clock
        self.archive = Archive(evaluations=_recalled(folder / "evaluations.json"))
        self._needed = asyncio.Event()
        if any((folder / "checkpoints").glob("epoch-*.safetensors")):
            self._needed.set()
        self._orders: asyncio.StreamWriter | None = None  # of an archivist that is ready
        self._pulling, self._retry_at, self._retry_seconds = False, 0.0, 0.0
        self._downloaded: tuple[ArchiveEvent.Downloaded, float] | None = None  # and when
        self._settled, self._sketches = 0, dict[int, bytes]()
        self._told: tuple[int, float] | None = None  # the epoch that newcomers were told, and when
        self._failed_stage = ""

    # -- deciding, once per reading --

    def look(self, state: SwarmState) -> None:
        """Returns at once."""
        now, records = self._clock(), [peer.record for peer in state.peers.values()]
        self._sketches = with_majority(self._sketches, records)
        self._settled = settled_epoch(records) or self._settled
        self._tell_newcomers(now)
        if self._downloaded:
            self._judge(*self._downloaded, now)
        elif not self._pulling and now >= self._retry_at:
            self._pull(records)

    def _pull(self, records: list[PeerRecord]) -> None:
        config, every = self._experiment.averaging, self._options.every_epochs
        pull = wanted(records, self._node.peer_id, self.archive.epoch, every, config)
        if pull is None:
            return
        self._needed.set()
        if self._orders:
            self._pulling = True
            self._order(ArchiveOrder(pull=ArchiveOrder.Pull(donors=pull.donors, epoch=pull.epoch)))

    def _judge(self, downloaded: ArchiveEvent.Downloaded, since: float, now: float) -> None:
        refusal = verdict(downloaded.epoch, downloaded.sketch, settled=self._settled, sketches=self._sketches,
                          config=self._experiment.averaging, waited=now - since)
        if refusal is None:
            return
        if refusal:
            log.warning("the state that %s sent is not archived: %s", downloaded.donor, refusal)
        self._downloaded = None
        self._order(ArchiveOrder(verdict=ArchiveOrder.Verdict(refusal=refusal)))

    def _tell_newcomers(self, now: float) -> None:
        """Of the epoch that one gets here; 0, which nobody wants, once that is over."""
        epoch = (self.archive.epoch or 0) if self._orders else 0
        lifetime = self._experiment.averaging.report_progress_expiration
        told, when = self._told or (0, now)
        if told != epoch or now - when >= lifetime / 3:
            self._told = epoch, now
            self._node.publish_record(PeerRecord(
                peer_id=self._node.peer_id, name=NAME, state=ARCHIVING, epoch=epoch, samples_accumulated=0,
                samples_total=0, samples_per_second=0.0, loss=None, group_size=0, version=VERSION, device="",
                client_mode=False, time=now), lifetime_seconds=lifetime)
            self._order(ArchiveOrder())  # for the token

    # -- the archivist --

    async def run(self) -> None:
        """Keep one running, as soon as it is needed, until this is cancelled."""
        seconds = 0.0
        while True:
            await self._needed.wait()
            started = time.monotonic()
            exit_code = await self._work()
            seconds = RESTART.after(seconds, time.monotonic() - started)
            self._failed("crash", f"the archivist ended with exit code {exit_code}; it is started again in "
                         f"{seconds:g} s")
            await asyncio.sleep(seconds)

    async def _work(self) -> int:
        read_end, write_end = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-W", "ignore", "-m", "coordinator.archivist", str(self._folder), "--events-fd",
                str(write_end), "--parent-pid", str(os.getpid()), stdin=asyncio.subprocess.PIPE, stdout=2,
                pass_fds=[write_end], start_new_session=True)  # away from the terminal's Ctrl-C
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        assert process.stdin is not None
        try:
            process.stdin.write(framed(self._begin()))
            async for event in read_messages(read_end, ArchiveEvent):
                self._hear(event, process.stdin)
        finally:
            self._orders, self._pulling, self._downloaded = None, False, None
            with suppress(ProcessLookupError):
                process.kill()
            exit_code = await process.wait()
        return exit_code

    def _begin(self) -> ArchiveOrder:
        options, evaluations = self._options, self.archive.evaluations
        return ArchiveOrder(token=self._node.token(), begin=ArchiveOrder.Begin(
            run_id=run_id(self._experiment), experiment=canonical(self._experiment), authority=self._authority,
            daemon=self._node.daemon, keep_last=options.keep_last, evaluate=options.evaluate,
            data=str(options.data or ""), hub=options.hub, evaluated=evaluations[-1].epoch if evaluations else 0))

    def _order(self, order: ArchiveOrder) -> None:
        order.token = self._node.token()
        if self._orders:
            self._orders.write(framed(order))

    def _hear(self, event: ArchiveEvent, orders: asyncio.StreamWriter) -> None:
        match event.WhichOneof("event"):
            case "ready":
                self._orders = orders
            case "downloaded":
                self._downloaded = event.downloaded, self._clock()
            case "kept":
                self._kept(event.kept)
            case "evaluated":
                self._evaluated(Evaluation(event.evaluated.epoch, dict(event.evaluated.figures)))
            case "uploaded":
                log.info("the checkpoint of epoch %d is on the hub", event.uploaded.epoch)
                self.archive = replace(self.archive, uploaded_epoch=event.uploaded.epoch)
                self._succeeded("upload")
            case "failed":
                self._failed(event.failed.stage, event.failed.message)
                if event.failed.stage in ("download", "disk"):
                    self._pulling, self._retry_seconds = False, self._retry.after(self._retry_seconds, 0.0)
                    self._retry_at = self._clock() + self._retry_seconds

    def _kept(self, kept: ArchiveEvent.Kept) -> None:
        log.info("checkpoint of epoch %d: %s", kept.epoch, kept.path)
        self._pulling, self._retry_seconds = False, 0.0
        self.archive = replace(self.archive, epoch=kept.epoch, time=kept.time_seconds, sha256=kept.sha256)
        self._succeeded("download", "disk", "crash")

    def _evaluated(self, evaluation: Evaluation) -> None:
        log.info("checkpoint of epoch %d: %s", evaluation.epoch, ", ".join(
            f"{name} {value:.4f}" for name, value in sorted(evaluation.figures.items())))
        self.archive = replace(self.archive, evaluations=with_evaluation(self.archive.evaluations, evaluation))
        self._succeeded("evaluation")
        try:
            _remember(self._folder / "evaluations.json", self.archive.evaluations)
        except OSError as error:
            self._failed("disk", f"the evaluations were not written: {error}")

    def _failed(self, stage: str, message: str) -> None:
        log.error("%s", message)
        counted = {**self.archive.failures, stage: self.archive.failures.get(stage, 0) + 1}
        self.archive, self._failed_stage = replace(self.archive, failures=counted, last_error=message), stage

    def _succeeded(self, *stages: str) -> None:
        if self._failed_stage in stages:
            self.archive, self._failed_stage = replace(self.archive, last_error=""), ""


@asynccontextmanager
async def archiving(archiver: Archiver) -> AsyncIterator[None]:
    """Keep its archivist running meanwhile."""
    running = asyncio.create_task(archiver.run())
    try:
        yield
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


def _recalled(path: Path) -> tuple[Evaluation, ...]:
    try:
        rows = json.loads(path.read_text())
        return tuple(Evaluation(int(row["epoch"]), {str(name): float(value) for name, value in row["figures"].items()})
                     for row in rows)
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s passed over: %s", path, error)
        return ()


def _remember(path: Path, evaluations: tuple[Evaluation, ...]) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps([asdict(one) for one in evaluations], indent=1))
    move_into_place(draft, path)
