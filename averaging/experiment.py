"""What all peers must agree on: training's and averaging's configs, composed, validated, fingerprinted."""

import hashlib
import json
from collections.abc import Sequence

from averaging.config import Averaging
from training.config import override, read_recipe, validate
from training.errors import BadInput
from training.recipe import Training


class Experiment(Training):
    """One experiment: everything that changes what is learned, nothing that one volunteer decides."""

    averaging: Averaging


def load_experiment(recipe: str, overrides: Sequence[str] = ()) -> Experiment:
    """The recipe with overrides laid over it, validated. Raises BadInput."""
    return validate(Experiment, override(read_recipe(recipe), overrides))


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
    return validate(Experiment, tree)


def fingerprint(document: bytes) -> str:
    """SHA-256 of the canonical document, hexadecimal."""
    return hashlib.sha256(document).hexdigest()


def run_id(experiment: Experiment) -> str:
    """The name under which its peers meet: unlike experiments never share one."""
    return f"{experiment.name}-{fingerprint(canonical(experiment))[:12]}"
