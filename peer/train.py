"""`covey train`: one experiment without a swarm, in one process, or in several that torchrun or Slurm has started.

Cut short, it goes on exactly from its folder. Of several processes, rank 0 tells, records, evaluates and writes
checkpoints; all leave together at one micro-batch, and if one is lost the others end within seconds.
"""

import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from threading import Event
from time import monotonic

import torch

from averaging.experiment import Experiment, run_id
from coordinator.state_dir import open_state_dir
from peer.device import choose_device
from peer.interrupts import leaving_on_signals
from peer.loggers.console import Silent, Teller, console
from peer.loggers.logger import Logger, Run, check_loggers, open_loggers
from peer.lone_run import LoneRun
from peer.place import find_place
from peer.preloading import bring_near
from peer.run_config import RunConfig
from peer.world import Crew, assemble, local_device
from training.checkpoint import parameters_checksum
from training.data.batches import batches
from training.data.checks import check_data
from training.data.open import open_source
from training.data.sources import Source, readers
from training.data.views import Views
from training.errors import BadInput
from training.evaluation import evaluate
from training.evaluation.features import check_classes
from training.loop import NonFiniteLoss, StepReport, train
from training.objectives.checks import pass_warnings, require_queue_within, warnings
from training.tuning import keep_memory


def train_alone(experiment: Experiment, config: RunConfig, *, as_json: bool) -> None:
    """Train until the schedule's end, `config.stop_at_epoch` or a signal; evaluate; leave a checkpoint.

    Raises BadInput before anything is trained, NonFiniteLoss, with what is left of the run, and LostProcess where
    another of its processes has ended.
    """
    place = find_place(os.environ)
    if place is None or place.rank == 0:
        check_loggers(config.loggers, config.metrics_port or 0)
    require_queue_within(experiment, check_data(experiment.data, config.data, config.batch_size, config.loader))
    device = choose_device(local_device(config.device, place))
    keep_memory()
    torch.set_num_threads(config.threads or torch.get_num_threads())
    with assemble(place, device) as crew:
        _train(LoneRun(experiment, config, device, crew), crew, as_json=as_json)


def _train(run: LoneRun, crew: Crew, *, as_json: bool) -> None:
    experiment, config, threads = run.experiment, run.config, max(1, readers(run.config.readers) // len(crew.here))
    folder = _bring_near(experiment, config, crew)
    images = open_source(experiment.data, folder, "train", threads=threads, loader=config.loader)
    validation = open_validation(experiment, config, images, folder) if crew.rank == 0 else None
    with ExitStack() as held:
        loggers: Sequence[Logger] = ()
        teller: Teller = Silent()
        if crew.rank == 0:
            held.enter_context(open_state_dir(config.run_dir, role="run", run_id=run_id(experiment),
                                              option="--run-dir"))
        run.resume()
        if crew.rank == 0:
            loggers = held.enter_context(open_loggers(config.loggers, Run(
                directory=config.run_dir, run_id=run_id(experiment), epoch=run.epoch,
                experiment=experiment.model_dump(mode="json"), metrics_port=config.metrics_port or 0)))
            teller = held.enter_context(console(as_json, run.epoch, run.last_epoch))
        leave = held.enter_context(leaving_on_signals())
        for name, logger in zip(config.loggers, loggers, strict=False):
            teller.tell("record", logger=name, where=logger.where)
        _tell_start(run, teller, len(images), judged=validation is not None)
        Course(run, images=images, validation=validation, loggers=loggers, teller=teller, leave=leave,
               threads=threads).go()


def _bring_near(experiment: Experiment, config: RunConfig, crew: Crew) -> Path | None:
    """What `bring_near` says; the first process of each machine copies, and the others find it copied."""
    bring = partial(bring_near, experiment.data, config.data, config.preload, config.preload_gib)
    brought = list[Path | None]()
    crew.at_first(lambda: brought.append(bring()), of_machine=True)
    return brought[0] if brought else bring()


def open_validation(experiment: Experiment, config: RunConfig, images: Source, folder: Path | None) -> Source | None:
    """What to evaluate on; None where there are no such images, or no classes, and nobody asked for it.

    Raises BadInput where somebody did, for a classifier, and where classes are not those of `images`.
    """
    wanted = experiment.objective == "classification" or config.evaluate_every_epochs is not None
    try:
        validation = open_source(experiment.data, folder, "val")
    except BadInput:
        if wanted:
            raise
        return None
    if images.labels is not None or wanted:
        check_classes(images, validation)
    return None if images.labels is None else validation


def _tell_start(run: LoneRun, teller: Teller, images: int, *, judged: bool) -> None:
    found = warnings(run.experiment, run.config.batch_size, processes=run.crew.size, sharing=run.sharing)
    for message in (*found, *pass_warnings(run.experiment, images)):
        teller.tell("warning", message=message)
    if not run.exact:
        teller.tell("warning", message="another batch size or number of processes than before: the run goes on about "
                    "where it was in its data")
    if not judged:
        teller.tell("warning", message="no evaluation: there are no images with classes to evaluate on")
    if run.resumed_from:
        teller.tell("resumed", checkpoint=str(run.resumed_from), epoch=run.epoch)
    several = {"processes": run.crew.size} if run.crew.size > 1 else {}
    teller.tell("ready", device=str(run.device), memory_format=run.memory_format, images=images, epoch=run.epoch,
                epochs=run.last_epoch, parameters=sum(p.numel() for p in run.objective.parameters()), **several)


class Course:
    """What happens around the steps of a run: figures, evaluations, checkpoints, and the end.

    Of several processes each has one. What rank 0 alone does, the others wait for, for as long as it takes.
    """

    def __init__(self, run: LoneRun, *, images: Source, validation: Source | None, loggers: Sequence[Logger],
                 teller: Teller, leave: Event, threads: int) -> None:
        self._run, self._images, self._validation, self._threads = run, images, validation, threads
        self._loggers, self._teller, self._leave = loggers, teller, leave
        self._told_to_leave = False  # one of the processes was
        self._is_judged = bool(run.crew.from_first(validation is not None))
        self._reports: list[StepReport] = []  # of the epoch at hand
        self._judgement: dict[str, float] = {}  # the last evaluation
        self._judged_epoch = -1

    def go(self) -> None:
        """To the end, or until told to leave."""
        run, started = self._run, monotonic()
        if run.epoch < run.last_epoch:
            self._train()
        if self._judged_epoch != run.epoch:
            self._judge()
        self._teller.tell(
            "finished", epoch=run.epoch, epochs=run.last_epoch, seconds=monotonic() - started,
            checkpoint=str(self._checkpoint()), parameters_checksum=parameters_checksum(run.objective),
            **self._judgement if self._judged_epoch == run.epoch else {})

    def _train(self) -> None:
        run, transforms = self._run, self._run.experiment.data.transforms
        views = Views(transforms, run.key)
        stream = batches(self._images, transforms, run.config.batch_size, key=run.key, start=run.batch + run.crew.rank,
                         every=run.crew.size, threads=self._threads)
        with closing(stream):  # whose threads end with it
            try:
                train(run.objective, stream, partial(views, device=run.device), run.stepper, run.precision,
                      report=self._report, should_stop=self._should_stop, samples_before=run.samples)
            except (ZeroDivisionError, OverflowError):
                raise  # a bug of ours, and none of the numbers
            except ArithmeticError as error:
                dump = None if isinstance(error, NonFiniteLoss) else run.objective.write_dump()
                raise NonFiniteLoss(f"{error}; the last good checkpoint is in {run.config.checkpoints}"
                                    + (f", what led to it in {dump}" if dump else "")) from None

    def _report(self, report: StepReport) -> None:
        self._told_to_leave |= self._run.crew.any_before(self._leave.is_set())
        self._reports.append(report)
        self._teller.moment(report.epoch, report.swarm_samples, report.samples_per_second * self._run.crew.size,
                            report.loss)
        if report.updated:
            self._run.updated(report)
            self._epoch_ended(report.epoch)

    def _epoch_ended(self, epoch: int) -> None:
        config, values = self._run.config, figures(self._reports, self._run)
        self._reports.clear()
        every = config.evaluate_every_epochs
        self._run.unite()
        if epoch == self._run.last_epoch or (every and epoch % every == 0):
            self._judge()
        if self._judged_epoch == epoch:
            values |= self._judgement
        for logger in self._loggers:
            logger.update(values, epoch)
        self._teller.update(values, epoch)
        if epoch % config.checkpoint_every_epochs == 0:
            self._checkpoint()
        self._run.reseed()  # last: whatever came before may have drawn random numbers

    def _should_stop(self, report: StepReport) -> bool:
        leaves = self._is_leaving() and (report.updated or self._run.stops_anywhere)
        if leaves:
            self._teller.tell("leaving", epoch=report.epoch)
        return leaves or report.epoch >= self._run.last_epoch

    def _is_leaving(self) -> bool:
        """In all processes, or in none."""
        return self._leave.is_set() if self._run.crew.size == 1 else self._told_to_leave

    def _judge(self) -> None:
        if self._is_judged and not self._is_leaving():
            with self._run.united() as metrics:
                self._run.crew.at_first(self._evaluate)
            self._judgement |= metrics
            self._judged_epoch = self._run.epoch

    def _evaluate(self) -> None:
        run = self._run
        assert self._validation is not None
        self._judgement = evaluate(run.objective, self._images, self._validation, run.experiment)

    def _checkpoint(self) -> str:
        path = str(self._run.checkpoint())
        self._teller.tell("checkpoint", path=path, epoch=self._run.epoch)
        return path


def figures(reports: Sequence[StepReport], run: LoneRun) -> dict[str, float]:
    """Of the epoch that these micro-batches of one size made up, under the loggers' names.

    Samples are those of all processes; loss, metrics and speed are this one's, the latter as if all had it.
    """
    last, count = reports[-1], len(reports)
    return {"samples_total": run.samples, "samples_per_second": last.samples_per_second * run.crew.size,
            "learning_rate": last.learning_rate, "loss": sum(report.loss for report in reports) / count,
            **{name: sum(report.metrics[name] for report in reports) / count for name in last.metrics}}
