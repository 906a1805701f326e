"""Any classifier of torchvision's as a trunk: its last layer is cut off, all other names stay."""

import torchvision
from torch import nn

from training.config import nearest
from training.errors import BadInput
from training.models.backbone import Backbone
from training.models.trunk_config import TORCHVISION, Trunk

WITH_SIDE_CLASSIFIERS = ("googlenet", "inception_v3")  # which train as well as what they are attached to


def build(config: Trunk) -> Backbone:
    """Images float [B, 3, H, W] -> features float [B, feature_width]. Raises BadInput for a name not known."""
    name = config.name.removeprefix(TORCHVISION)
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise BadInput(f"model.trunk.name = {config.name!r}", expected="torchvision: and the name of a classifier of "
                       f"torchvision {torchvision.__version__}", mend=nearest(name, known) or "Its documentation "
                       "lists them.")
    options = {"aux_logits": False, "init_weights": True} if name in WITH_SIDE_CLASSIFIERS else {}
    trunk: Backbone = torchvision.models.get_model(name, weights=None, **options)
    return _without_classifier(trunk)


def _without_classifier(trunk: Backbone) -> Backbone:
    """The last layer with weights is the classifier: linear, or a convolution of 1 x 1 in squeezenet."""
    name, layer = [item for item in trunk.named_modules() if isinstance(item[1], nn.Linear | nn.Conv2d)][-1]
    parent, _, last = name.rpartition(".")
    setattr(trunk.get_submodule(parent), last, nn.Identity())
    trunk.cut_off = f"{name}."
    trunk.feature_width = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    return trunk
