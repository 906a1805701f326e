"""Learning, shown: `python -m benchmarks.learning` prints the tables of docs/results.md.

Recipes were tuned on seed 0, which is therefore not among the seeds that it runs unless told to.
"""

import argparse
import multiprocessing
import os
import platform
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from pathlib import Path
from statistics import mean
from time import perf_counter

import torch

from benchmarks.learning_runs import METHODS, TASKS, Figures, recipe, run
from training.errors import BadInput

LANES = 2  # runs side by side, one thread each
QUICK = ("optimizer.max_epochs=3", "optimizer.warmup_epochs=1", "averaging.target_batch_size=256")
COLUMNS = {"knn_accuracy": "k-NN", "linear_probe_accuracy": "linear probe", "top1_accuracy": "top-1",
           "prototype_entropy": "prototype entropy"}
GOALS = {("synthetic", "swav", "prototype_entropy"): 0.9, ("digits", "swav", "prototype_entropy"): 0.9,
         ("synthetic", "supervised", "top1_accuracy"): 0.95}
Results = dict[tuple[str, str], list[Figures]]  # of (task, method), one entry per seed


def main() -> None:
    """All runs, LANES at a time; then a table for each data set, in Markdown."""
    arguments = _arguments()
    tasks = [arguments.only] if arguments.only else list(TASKS)
    overrides, started = [*arguments.override, *(QUICK if arguments.quick else ())], perf_counter()
    try:
        results = measure(tasks, arguments.seeds, overrides)
    except BadInput as wrong:
        raise SystemExit(f"benchmarks.learning: {wrong}") from None
    minutes = (perf_counter() - started) / 60
    command = f"python -m benchmarks.learning {' '.join(sys.argv[1:])}".strip()
    for task in tasks:
        print(f"\n### {TASKS[task].title}\n\n`{command}`, {date.today()}, {LANES} runs at a time, one thread each, "
              f"{platform.machine()}, torch {torch.__version__}, {minutes:.0f} minutes for all. "
              f"Per cent: mean (lowest to highest) of seeds {', '.join(map(str, arguments.seeds))}.\n")
        print("\n".join(table(task, results, overrides)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", choices=TASKS, help="one of the data sets")
    parser.add_argument("--quick", action="store_true", help="three updates: does it run? Its figures mean nothing")
    parser.add_argument("--set", dest="override", nargs="+", default=[], metavar="KEY=VALUE",
                        help="over all recipes, for tuning on seed 0")
    return parser.parse_args()


def measure(tasks: Sequence[str], seeds: Sequence[int], overrides: Sequence[str]) -> Results:
    """Every method on every task with every seed. Raises BadInput, before anything runs, if a recipe is amiss."""
    runs = [(task, method, seed) for method in ("swav", "supervised", "pixels", "untrained")  # the longest first
            for task in tasks for seed in seeds]
    for each in runs:
        recipe(*each, overrides)
    results: Results = defaultdict(list)
    with (tempfile.TemporaryDirectory(prefix="covey-learning-") as scratch,
          ProcessPoolExecutor(LANES, multiprocessing.get_context("spawn")) as lanes):
        jobs = {lanes.submit(run, *each, overrides, Path(scratch)): each for each in runs}
        for job in as_completed(jobs):
            task, method, _ = jobs[job]
            results[task, method].append(job.result())
    return results


def table(task: str, results: Results, overrides: Sequence[str]) -> Iterator[str]:
    """Lines of Markdown: a row per method, then what became of the goals."""
    k = recipe(task, "swav", 0, overrides).evaluation.knn_k
    yield f"| features | updates x samples | {' | '.join(COLUMNS.values())} |".replace("k-NN", f"k-NN, k = {k}")
    yield "|---" * (2 + len(COLUMNS)) + "|"
    for method, name in METHODS.items():
        cells = [_spread([figures[column] for figures in results[task, method] if column in figures])
                 for column in COLUMNS]
        yield f"| {name} | {_budget(task, method, overrides)} | {' | '.join(cells)} |"
    yield ""
    for (about, method, column), goal in GOALS.items():
        if about == task:
            worst = min(figures[column] for figures in results[task, method])
            yield (f"Goal: {COLUMNS[column]} of {METHODS[method]} over {goal:.0%} with every seed: "
                   f"{'met' if worst > goal else 'MISSED'}, {worst:.1%} at worst.")


def _budget(task: str, method: str, overrides: Sequence[str]) -> str:
    if method not in ("swav", "supervised"):
        return ""
    experiment = recipe(task, method, 0, overrides)
    return f"{experiment.optimizer.max_epochs} x {experiment.averaging.target_batch_size}"


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{100 * mean(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the lanes, which import torch anew
    main()
