"""The rival: a worker's very training loop without a swarm. `python -m benchmarks.lone_loop RECIPE [KEY=VALUE ...]`

Prints a JSON line per update, as `covey join --json` does per collaborative epoch.
"""

import json
import sys
import time

import torch

from averaging.experiment import load_experiment
from training.data.batches import batches
from training.data.sources import open_source
from training.data.views import Views
from training.loop import LocalStepper, StepReport, train
from training.objectives.objective import build_objective
from training.optimizers.build import build_optimizer

BATCH = 64


def main() -> None:
    """Train until killed."""
    torch.set_num_threads(1)
    experiment = load_experiment(sys.argv[1], sys.argv[2:])
    objective = build_objective(experiment)
    stepper = LocalStepper(build_optimizer(experiment.optimizer, objective.parameters()),
                           experiment.averaging.target_batch_size)
    told = 0

    def report(step: StepReport) -> None:
        nonlocal told
        if step.updated:
            print(json.dumps({"event": "epoch", "own_samples": step.samples_total - told}), flush=True)
            told = step.samples_total

    train(objective, batches(open_source(experiment.data, None, "train"), BATCH, identity="bench", run=time.time_ns()),
          Views(experiment.data.transforms, seed=0), stepper, report=report, should_stop=lambda _: False)


if __name__ == "__main__":
    main()
