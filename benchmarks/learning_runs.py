"""One run of benchmarks/learning.py: a recipe, its training by the loop that a worker runs, and what came of it.

In one process, without a swarm. All that is random hangs on the seed: the parameters, the order of the images, their
views, and the images themselves (the synthetic set is drawn anew; of the digits another fifth is held out).
"""

import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from time import perf_counter

import torch
from PIL import Image
from sklearn.datasets import load_digits

from averaging.experiment import Experiment, load_experiment
from training.data.batches import batches
from training.data.open import open_source
from training.data.views import Views
from training.evaluation import evaluate
from training.evaluation.features import Splits, backbone_features, pixel_features
from training.evaluation.knn import knn_figures
from training.evaluation.probe import probe_figures
from training.loop import LocalStepper, StepReport, train
from training.objectives.objective import Objective, build_objective
from training.optimizers.build import build_optimizer, govern
from training.optimizers.schedule import learning_rate
from training.precision import Precision

METHODS = {"pixels": "raw pixels", "untrained": "untrained", "swav": "SwAV, no labels", "supervised": "supervised"}
LAST_UPDATES = 10  # over which a metric at the end is averaged
MICRO_BATCH = 256  # what Sinkhorn and BatchNorm see at once
CPU = torch.device("cpu")
Figures = dict[str, float]


@dataclass(frozen=True)
class Task:
    """A data set, and the recipes that SwAV and supervised training of the same trunk begin from."""

    title: str
    swav: tuple[str, ...]        # a recipe, and what is laid over it
    supervised: tuple[str, ...]  # likewise


# a class has some 144 images to train on: 200 neighbours, the published number, would always take in other classes
DIGITS = ("evaluation.resize_size=16", "evaluation.crop_size=16", "evaluation.knn_k=20")
TASKS = {
    "synthetic": Task(
        "Synthetic set: 16 classes (4 shapes x 4 textures), 4096 images to train on, 1024 to judge by, 32 pixels",
        ("demo",),
        ("demo_classification",)),
    "digits": Task(
        "scikit-learn's digits: 10 classes, 1437 or 1438 images to train on, the others to judge by, 8 pixels made 16",
        (str(Path(__file__).parents[1] / "tests/swarm/digits.toml"), *DIGITS, "optimizer.max_epochs=200"),
        ("demo_classification", *DIGITS, "model.trunk.stem=3x3", "data.dataset=image_folder", "data.num_classes=10",
         "data.transforms.size_crops=[16]", "data.transforms.crop_scales=[[0.7, 1.0]]",
         "data.transforms.flip_probability=0.0", "optimizer.max_epochs=80", "optimizer.warmup_epochs=10")),
}


def run(task: str, method: str, seed: int, overrides: Sequence[str], scratch: Path) -> Figures:
    """One line of the table for one seed: train if there is something to train, then judge."""
    torch.set_num_threads(1)
    started, experiment = perf_counter(), recipe(task, method, seed, overrides)
    folder = write_digits(Path(tempfile.mkdtemp(dir=scratch)), fold=seed % 5) if task == "digits" else None
    figures = _figures(experiment, method, folder)
    print(f"{task}, {METHODS[method]}, seed {seed}, {perf_counter() - started:.0f} s: "
          + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()), file=sys.stderr, flush=True)
    return figures


def recipe(task: str, method: str, seed: int, overrides: Sequence[str] = ()) -> Experiment:
    """What `method` trains; for pixels and untrained, SwAV's, as it is before training."""
    name, *changes = TASKS[task].supervised if method == "supervised" else TASKS[task].swav
    return load_experiment(name, [*changes, f"seed={seed}", f"data.synthetic.seed={seed}", *overrides])


def write_digits(folder: Path, fold: int) -> Path:
    """All 1,797 digits as PNG files of 16 pixels in class folders; of every five, that at `fold` is held out in val."""
    bunch = load_digits()
    for number, (pixels, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
        path = folder / ("val" if number % 5 == fold else "train") / str(label) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype("uint8")).resize((16, 16), Image.Resampling.BILINEAR).save(path)
    return folder


def _figures(experiment: Experiment, method: str, folder: Path | None) -> Figures:
    train_split, val = (open_source(experiment.data, folder, split) for split in ("train", "val"))
    if method == "pixels":
        return _judged(pixel_features(train_split, val, experiment.evaluation), experiment)
    objective = build_objective(experiment, batch_size=MICRO_BATCH)
    figures = Figures()
    if method != "untrained":
        at_the_end = fit(experiment, objective, folder)
        figures = {name: value for name, value in at_the_end.items() if name == "prototype_entropy"}
    if method == "supervised":
        figures["top1_accuracy"] = evaluate(objective, train_split, val, experiment)["top1_accuracy"]
    return figures | _judged(backbone_features(objective.backbone, train_split, val, experiment.evaluation,
                                               experiment.data.transforms), experiment)


def _judged(features: Splits, experiment: Experiment) -> Figures:
    return knn_figures(features, experiment.evaluation) | probe_figures(features, experiment.evaluation)


def fit(experiment: Experiment, objective: Objective, folder: Path | None) -> Figures:
    """Trains to the end of the schedule; what the metrics were over the last updates."""
    data, options, target = experiment.data, experiment.optimizer, experiment.averaging.target_batch_size
    optimizer, key = build_optimizer(options, objective), f"learning/{experiment.seed}"
    stepper, views = LocalStepper(optimizer, target), Views(data.transforms, key)
    govern(optimizer, objective, lambda epoch: learning_rate(options, epoch, batch_size=target,
                                                             images_per_pass=data.images_per_pass),
           lambda: stepper.epoch, options.grad_clip_norm)
    last = deque[Figures](maxlen=LAST_UPDATES * -(-target // MICRO_BATCH))

    def report(step: StepReport) -> None:
        last.append(step.metrics)

    train(objective, batches(open_source(data, folder, "train"), data.transforms, MICRO_BATCH, key=key),
          lambda batch: views(batch, CPU), stepper, Precision(experiment.model.amp, CPU, objective.parameters()),
          report=report, should_stop=lambda step: step.epoch >= options.max_epochs)
    return {name: mean(metrics[name] for metrics in last) for name in last[0]}
