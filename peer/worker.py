"""The worker, where everything is wired: `python -m peer.worker STATE_DIR --events-fd N --parent-pid PID`.

The order matters: the DHT's process is forked first, from the main thread, before there are threads or CUDA; the
averagers' next; everything else after that.
"""

import argparse
import faulthandler
import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import torch
from hivemind.utils import get_dht_time

from averaging.authorisation import MemberAuthoriser
from averaging.ban_records import keep_bans
from averaging.bulletin import Bulletin
from averaging.dht import DHT, open_identity, start_dht
from averaging.experiment import Experiment, parse
from averaging.known_peers import recall_peers
from averaging.process import die_with_parent
from averaging.progress import record_validators
from averaging.receipt_records import ReceiptBook
from averaging.records import PeerRecord
from averaging.strategies.assist import assist
from averaging.strategies.open import open_strategy
from averaging.strategies.strategy import Strategy
from averaging.transports.swarm.swarm import Swarm
from averaging.version import VERSION
from peer.config import PeerConfig
from peer.device import choose_device
from peer.events import EventWriter
from peer.job import Job, ban_file, read_job, read_token
from peer.preloading import bring_near
from peer.telemetry import Telemetry
from proto.peer_pb2 import WorkerEvent
from training.checkpoint import load_into, newest_checkpoint, parameters_checksum, read_checkpoint, write_checkpoint
from training.data.batches import batches
from training.data.open import open_source
from training.data.sources import Source, readers
from training.data.views import Views
from training.errors import BadInput
from training.evaluation import evaluate
from training.evaluation.features import check_classes
from training.loop import NonFiniteLoss, StepReport, train
from training.objectives.objective import Objective, build_objective
from training.optimizers.build import build_optimizer, govern, initialise_state
from training.optimizers.schedule import learning_rate
from training.precision import Precision
from training.tuning import keep_memory, lay_out

HURRY_SECONDS = 2.0  # that a round which has begun may still take once this peer is to leave
log = logging.getLogger(__name__)


def main() -> None:
    """Do the job in STATE_DIR. Exit code 0: left in good order; 2: refused, a restart won't help; else: start anew."""
    parser = argparse.ArgumentParser()
    parser.add_argument("state_dir", type=Path)
    parser.add_argument("--events-fd", type=int, required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    arguments = parser.parse_args()
    die_with_parent(arguments.parent_pid)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # says in the log where a worker that hangs is
    events = EventWriter(arguments.events_fd)
    try:
        take_part(read_job(arguments.state_dir), events)
    except BadInput as error:
        events.send(WorkerEvent(refused=WorkerEvent.Refused(message=str(error))))
        sys.exit(2)
    except ArithmeticError as error:  # the loss is no number: the next worker goes on from the last checkpoint
        log.error("%s", error, exc_info=not isinstance(error, NonFiniteLoss))
        sys.exit(1)


def take_part(job: Job, events: EventWriter) -> None:
    """Be in the swarm until SIGTERM or the job's last epoch. Before training, SIGTERM ends the process at once."""
    experiment, config = parse(job.experiment), job.config
    key = open_identity(config.identity_path)
    authority, over = job.authority.encode(), threading.Event()
    bans = ban_file(job)
    member = MemberAuthoriser(key, authority=authority, run_id=job.run_id, read_token=partial(read_token, job),
                              is_banned=bans.is_banned)
    dht = start_dht(identity_path=config.identity_path, host_maddrs=config.host_maddrs, client_mode=config.client_mode,
                    initial_peers=[*job.initial_peers, *recall_peers(config.known_peers)], authorizer=member,
                    record_validators=record_validators(job.run_id, key, authority))
    try:
        bulletin = Bulletin(dht, job.run_id, key, first_record(dht, config), experiment.averaging,
                            is_banned=bans.is_banned)
        receipts = ReceiptBook(dht, job.run_id, key)
        swarm = Swarm(dht=dht, run_id=job.run_id, key=key, config=experiment.averaging, bulletin=bulletin,
                      client_mode=config.client_mode, auxiliary=config.auxiliary, authoriser=member, receipts=receipts)
        threading.Thread(target=keep_bans, args=(dht, job.run_id, bans, over), name="bans", daemon=True).start()
        try:
            telemetry = Telemetry(events, bulletin, config.known_peers,
                                  vital=[lambda: dht.is_serving, lambda: swarm.is_alive])
            work = help_others if config.auxiliary else train_together
            finished = work(job, experiment, swarm, telemetry, bulletin)
        finally:
            over.set()
            swarm.close()
            receipts.close()
            bulletin.close()
        events.send(WorkerEvent(finished=finished))
    finally:
        dht.shutdown()


def first_record(dht: DHT, config: PeerConfig) -> PeerRecord:
    """What the swarm is told of this peer before it trains."""
    return PeerRecord(
        peer_id=str(dht.peer_id), name=config.name, state="starting", epoch=0, samples_accumulated=0, samples_total=0,
        samples_per_second=0.0, loss=None, group_size=0, version=VERSION, device="", client_mode=config.client_mode,
        auxiliary=config.auxiliary, time=get_dht_time(),
        addresses=() if config.client_mode else tuple(map(str, dht.get_visible_maddrs()))[:8])


def help_others(job: Job, experiment: Experiment, swarm: Swarm, telemetry: Telemetry,
                bulletin: Bulletin) -> WorkerEvent.Finished:
    """Help others to average, until SIGTERM."""
    leave = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: leave.set())
    bulletin.update(state="training", device="none")
    telemetry.helping()
    assist(experiment.averaging, swarm, leave, telemetry.round)
    telemetry.leaving()
    return WorkerEvent.Finished(epoch=bulletin.record.epoch)


def train_together(job: Job, experiment: Experiment, swarm: Swarm, telemetry: Telemetry,
                   bulletin: Bulletin) -> WorkerEvent.Finished:
    """Train until SIGTERM or the job's last epoch."""
    config = job.config
    keep_memory()
    torch.set_num_threads(config.threads or torch.get_num_threads())
    device, transforms = choose_device(config.device), experiment.data.transforms
    bulletin.update(device=str(device))
    source, validation = open_data(experiment, config)
    # a restart must not repeat the order of images, nor the views, of the start before
    draws = f"{swarm.peer_id}/{time.time_ns()}"
    objective, precision = build(experiment, config, device)
    optimizer = build_optimizer(experiment.optimizer, objective)
    initialise_state(optimizer)
    stepper = open_strategy(
        experiment.averaging, transport=swarm, optimizer=optimizer, shared_buffers=objective.shared_buffers(),
        on_round=telemetry.round, on_state_load=telemetry.state_load)
    try:
        govern(optimizer, objective, partial(
            learning_rate, experiment.optimizer, batch_size=experiment.averaging.target_batch_size,
            images_per_pass=experiment.data.images_per_pass), epoch=lambda: stepper.epoch,
            grad_clip_norm=experiment.optimizer.grad_clip_norm)
        stepper.resume(restore(job, objective, stepper, precision))
        if config.compile:
            objective.backbone.compile()
        leave, seen = threading.Event(), stepper.epoch
        signal.signal(signal.SIGTERM, lambda *_: leave.set())
        telemetry.started(objective, source, stepper.epoch)

        def checkpoint(epoch: int) -> str:
            path = str(write_checkpoint(config.checkpoints, epoch=epoch, experiment=job.experiment,
                                        fingerprint=job.fingerprint, objective=objective, optimizer=optimizer,
                                        strategy=stepper.extra_state(), keep_last=config.keep_last_checkpoints,
                                        progress={"precision": precision.state()}))
            telemetry.checkpointed(path, epoch)
            return path

        def is_due(every: int | None, epoch: int) -> bool:
            return every is not None and epoch // every > seen // every  # a download may pass over epochs

        def should_stop(report: StepReport) -> bool:
            nonlocal seen
            if report.epoch != seen:
                with telemetry.resting():
                    if is_due(config.checkpoint_every_epochs, report.epoch):
                        checkpoint(report.epoch)
                    if validation and is_due(config.evaluate_every_epochs, report.epoch) and not leave.is_set():
                        telemetry.evaluated(report.epoch, evaluate(objective, source, validation, experiment))
                seen = report.epoch
            return leave.is_set() or report.epoch >= (config.stop_at_epoch or math.inf)

        images = batches(source, transforms, config.batch_size, key=draws, threads=readers(config.readers))
        with hurrying(leave, stepper), closing(images):  # whose threads end with it
            train(objective, images, partial(Views(transforms, draws), device=device), stepper, precision,
                  report=telemetry.step, should_stop=should_stop)
            if not leave.is_set():
                stepper.settle()  # whoever stops by epoch stops with the swarm's parameters, not just its own
        telemetry.leaving()
        return WorkerEvent.Finished(epoch=stepper.epoch, parameters_checksum=parameters_checksum(objective),
                                    checkpoint=checkpoint(stepper.epoch))
    finally:
        stepper.close()


def open_data(experiment: Experiment, config: PeerConfig) -> tuple[Source, Source | None]:
    """The images to train on, and those to evaluate on if that is wanted. Raises BadInput."""
    folder = bring_near(experiment.data, config.data, config.preload, config.preload_gib)
    source = open_source(experiment.data, folder, "train", threads=readers(config.readers), loader=config.loader)
    if not config.evaluate_every_epochs:
        return source, None
    validation = open_source(experiment.data, folder, "val", threads=readers(config.readers))
    check_classes(source, validation)
    return source, validation


def build(experiment: Experiment, config: PeerConfig, device: torch.device) -> tuple[Objective, Precision]:
    """What is trained, on `device`, laid out as is fastest there. Raises BadInput for what the device can't do."""
    objective = build_objective(experiment, batch_size=config.batch_size, output_dir=config.state_dir).to(device)
    precision = Precision(experiment.model.amp, device, objective.parameters())
    lay_out(objective, config.memory_format, experiment.data.transforms.size_crops, device, precision)
    return objective, precision


@contextmanager
def hurrying(leave: threading.Event, stepper: Strategy) -> Iterator[None]:
    """While inside, `leave` also ends a step's wait for other peers, a little later."""
    done = threading.Event()

    def hurry() -> None:
        leave.wait()
        while not done.wait(HURRY_SECONDS):
            stepper.hurry()

    threading.Thread(target=hurry, name="hurry", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def restore(job: Job, objective: Objective, stepper: Strategy, precision: Precision) -> int:
    """Load this peer's newest good checkpoint; the epoch to resume at, 0 if there is none."""
    path = newest_checkpoint(job.config.checkpoints)
    if path is None:
        return 0
    checkpoint = read_checkpoint(path)
    if checkpoint.fingerprint != job.fingerprint:
        raise BadInput(f"{path} is of experiment {checkpoint.fingerprint[:12]}", expected=job.fingerprint[:12],
                       mend="Join with another --state-dir.")
    load_into(checkpoint, objective, stepper.optimizer)
    stepper.load_extra_state(checkpoint.strategy)
    precision.load(checkpoint.progress["precision"])
    log.info("resumed from %s", path)
    return checkpoint.epoch


if __name__ == "__main__":
    main()
