"""When local SGD steps, averages and copies (Lin et al., arXiv 1808.07217, and references/local_sgd.md): pure."""

from dataclasses import dataclass
from typing import Literal

InitialStepMethod = Literal["single_process", "multiple_processes"]


@dataclass(frozen=True)
class Turn:
    """What is done with one local step."""

    alone: bool  # only the first process makes it, the others wait for its model
    then: Literal["nothing", "average", "copy"]  # "average": all take the mean model; "copy": the first one's


def turn(step: int, *, local_steps: int = 4, initial_steps: int = 0,
         initial_step_method: InitialStepMethod = "single_process") -> Turn:
    """What is to be done with local step number `step`, counted from 0, the initial ones included.

    The first `initial_steps`: by "multiple_processes" all step, and average after each; by "single_process" the first
    process steps, and after the last one the others copy its model. From then on all step, and average after every
    `local_steps`.
    """
    if step < initial_steps:
        if initial_step_method == "multiple_processes":
            return Turn(alone=False, then="average")
        return Turn(alone=True, then="copy" if step == initial_steps - 1 else "nothing")
    ends_a_round = (step - initial_steps + 1) % local_steps == 0
    return Turn(alone=False, then="average" if ends_a_round else "nothing")
