"""The rival: a worker's very training loop without a swarm. `python -m benchmarks.lone_loop RECIPE [KEY=VALUE ...]`

Prints a JSON line per update, as `covey join --json` does per collaborative epoch.
"""

import json
import sys
import time
from functools import partial

import torch

from averaging.experiment import load_experiment
from training.data.batches import batches
from training.data.open import open_source
from training.data.views import Views
from training.loop import LocalStepper, StepReport, train
from training.objectives.objective import build_objective
from training.optimizers.build import build_optimizer, govern
from training.optimizers.schedule import learning_rate
from training.precision import Precision
from training.tuning import keep_memory, lay_out

BATCH, MEMORY_FORMAT = 64, "channels_last"  # the peers' as well


def main() -> None:
    """Train until killed."""
    keep_memory()
    torch.set_num_threads(1)
    experiment = load_experiment(sys.argv[1], sys.argv[2:])
    cpu, key, transforms = torch.device("cpu"), f"bench/{time.time_ns()}", experiment.data.transforms
    objective = build_objective(experiment, batch_size=BATCH)
    precision = Precision(experiment.model.amp, cpu, objective.parameters())
    lay_out(objective, MEMORY_FORMAT, transforms.size_crops, cpu, precision)
    stepper = LocalStepper(build_optimizer(experiment.optimizer, objective), experiment.averaging.target_batch_size)
    govern(stepper.optimizer, objective, partial(
        learning_rate, experiment.optimizer, batch_size=experiment.averaging.target_batch_size,
        images_per_pass=experiment.data.images_per_pass), epoch=lambda: stepper.epoch)
    told = 0

    def report(step: StepReport) -> None:
        nonlocal told
        if step.updated:
            print(json.dumps({"event": "epoch", "own_samples": step.samples_total - told}), flush=True)
            told = step.samples_total

    images = batches(open_source(experiment.data, None, "train"), transforms, BATCH, key=key)
    train(objective, images, partial(Views(transforms, key), device=cpu), stepper, precision, report=report,
          should_stop=lambda _: False)


if __name__ == "__main__":
    main()
