"""A trained backbone as a file that torchvision's network of the same kind loads, and whatever shares its names."""

from collections.abc import Mapping
from pathlib import Path

import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from training.atomic import move_into_place
from training.errors import BadInput
from training.models.trunk_config import TORCHVISION, Trunk
from training.objectives.classification import Classification
from training.objectives.objective import Objective

RESNETS = {(18, 1, 64): "resnet18", (34, 1, 64): "resnet34", (50, 1, 64): "resnet50", (101, 1, 64): "resnet101",
           (152, 1, 64): "resnet152", (50, 32, 4): "resnext50_32x4d", (101, 32, 8): "resnext101_32x8d",
           (101, 64, 4): "resnext101_64x4d", (50, 1, 128): "wide_resnet50_2", (101, 1, 128): "wide_resnet101_2"}
SUFFIXES = (".safetensors", ".pth")


def torchvision_state(objective: Objective) -> dict[str, Tensor]:
    """The backbone's weights and running statistics, and a classifier's where one was trained, under torchvision's
    names; on the CPU. SwAV's head and prototypes are left out.
    """
    state: dict[str, Tensor] = dict(objective.backbone.state_dict())
    # squeezenet's classifier is a convolution with a ReLU after it: a linear one has no place there
    if isinstance(objective, Classification) and not isinstance(objective.backbone, torchvision.models.SqueezeNet):
        state |= {f"{classifier_name(objective)}.{name}": tensor
                  for name, tensor in objective.classifier.state_dict().items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def classifier_name(objective: Objective) -> str:
    """What torchvision calls the last layer of that network, which the backbone lacks."""
    return str(objective.backbone.cut_off).removesuffix(".")


def write_export(state: Mapping[str, Tensor], path: Path, about: Mapping[str, str]) -> None:
    """Writes `state` to `path`, whole or not at all: .safetensors, with `about` in it, or .pth by torch.save.

    Raises BadInput for another suffix or a folder that is not there.
    """
    check_path(path)
    staged = path.with_name(f"{path.name}.tmp")
    if path.suffix == ".pth":
        torch.save(dict(state), staged)
    else:
        save_file(dict(state), staged, {"format": "pt", **about})
    move_into_place(staged, path)


def check_path(path: Path) -> None:
    """Raises BadInput unless something can be exported to `path`."""
    if path.suffix not in SUFFIXES:
        raise BadInput(f"file {str(path)!r}", expected=f"a name that ends in {' or '.join(SUFFIXES)}",
                       mend="Name it so.")
    if not path.absolute().parent.is_dir():
        raise BadInput(f"file {str(path)!r} in a folder that is not there", expected="an existing folder",
                       mend="Make it first.")


def counterpart(trunk: Trunk) -> str | None:
    """The name of torchvision's network with the same layers, which loads the export; None if it has none."""
    if trunk.family == "resnet":
        usual = trunk.stem == "7x7" and trunk.width_multiplier == 1 and trunk.norm == "batch"
        return RESNETS.get((trunk.layers, trunk.groups, trunk.width_per_group)) if usual else None
    name = trunk.name.removeprefix(TORCHVISION)
    return name if trunk.norm == "batch" and name in torchvision.models.list_models() else None

