"""Weights for a trunk from a file in torchvision's layout."""

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from training.errors import BadInput
from training.models.backbone import Backbone


def load_pretrained(trunk: Backbone, path: str) -> None:
    """Copies the weights of the .safetensors file at `path` into `trunk`; a classifier in it is left out.

    Raises BadInput if the file can't be read, or its names or shapes are not the trunk's.
    """
    weights = {name: weight for name, weight in _read(path).items() if not name.startswith(trunk.cut_off)}
    own = trunk.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        found, expected = _shape(weights.get(name)), _shape(own.get(name))
        if found != expected:
            raise BadInput(f"{path} has {name} {found}", expected=expected,
                           mend="Check that model.trunk describes the network that the file is from.")
    trunk.load_state_dict(weights)


def _read(path: str) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"model.trunk.pretrained = {path!r} ({error})", expected="a readable .safetensors file",
                       mend="Check the path; `covey export` writes such files.") from None


def _shape(weight: Tensor | None) -> str:
    return "nowhere" if weight is None else f"of shape {list(weight.shape)}"
