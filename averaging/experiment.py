"""What all peers must agree on: training's and averaging's configs, composed, validated, fingerprinted."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import Field, model_validator

from averaging.config import Averaging
from training.config import nearest, override, read_recipe, validate
from training.errors import BadInput
from training.optimizers.schedule import total_updates
from training.recipe import ClassificationTraining, SwavTraining, Training


class Experiment(Training):
    """One experiment: everything that changes what is learned, nothing that one volunteer decides."""

    averaging: Averaging = Field(description="how peers agree")

    @model_validator(mode="after")
    def _rates_are_in_order(self) -> Self:
        self.optimizer.require_order(self.averaging.target_batch_size)
        return self


class SwavExperiment(SwavTraining, Experiment):
    """SwAV, with how peers agree."""

    @model_validator(mode="after")
    def _nothing_waits_for_ever(self) -> Self:
        """Counts that the run never reaches: DeDLOC's documents had both."""
        end = total_updates(self.optimizer, batch_size=self.averaging.target_batch_size,
                            images_per_pass=self.data.images_per_pass)
        if self.loss.queue.queue_length and self.loss.queue.start_iter >= end:
            raise ValueError(f"loss.queue.start_iter below {end}, the collaborative epochs of the run, or there would "
                             f"never be a queue, not {self.loss.queue.start_iter}")
        if self.loss.freeze_prototypes_iters >= end:
            raise ValueError(f"loss.freeze_prototypes_iters below {end}, the collaborative epochs of the run, or "
                             f"prototypes would never move, not {self.loss.freeze_prototypes_iters}")
        return self


class ClassificationExperiment(ClassificationTraining, Experiment):
    """Supervised classification, with how peers agree."""


KINDS: dict[str, type[Experiment]] = {"swav": SwavExperiment, "classification": ClassificationExperiment}


def load_experiment(recipe: str, overrides: Sequence[str] = ()) -> Experiment:
    """The recipe with overrides laid over it, validated. Raises BadInput."""
    return experiment_of(override(read_recipe(recipe), overrides))


def experiment_of(tree: Mapping[str, Any]) -> Experiment:
    """`tree` as an experiment of the objective that it names. Raises BadInput."""
    objective = tree.get("objective", "swav")
    if objective not in KINDS:
        raise BadInput(f"objective = {objective!r}", expected=f"one of {', '.join(KINDS)}",
                       mend=nearest(str(objective), list(KINDS)) or "Change it.")
    return validate(KINDS[objective], tree)


def canonical(experiment: Experiment) -> bytes:
    """The experiment as compact JSON with sorted keys: equal experiments give equal bytes."""
    return json.dumps(experiment.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()


def parse(document: bytes) -> Experiment:
    """The experiment of a canonical document from elsewhere. Raises BadInput on what this version doesn't know."""
    try:
        tree = json.loads(document)
    except ValueError as error:
        raise BadInput(f"an experiment that is not JSON ({error})", expected="the document that a coordinator "
                       "hands out", mend="Ask the operator for a fresh link.") from None
    if not isinstance(tree, dict):
        raise BadInput("an experiment that is not a JSON object", expected="the document that a coordinator "
                       "hands out", mend="Ask the operator for a fresh link.")
    return experiment_of(tree)


def fingerprint(document: bytes) -> str:
    """SHA-256 of the canonical document, hexadecimal."""
    return hashlib.sha256(document).hexdigest()


def run_id(experiment: Experiment) -> str:
    """The name under which its peers meet: unlike experiments never share one."""
    return f"{experiment.name}-{fingerprint(canonical(experiment))[:12]}"
