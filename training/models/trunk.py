"""A trunk from its config: one line for each family."""

from collections.abc import Callable

from training.models import lenet, regnet, resnet, torchvision_models
from training.models.backbone import Backbone
from training.models.pretrained import load_pretrained
from training.models.trunk_config import Trunk

FAMILIES: dict[str, Callable[[Trunk], Backbone]] = {
    "resnet": resnet.ResNet,
    "regnet": regnet.build,
    "lenet": lenet.LeNet,
    "torchvision": torchvision_models.build,
}


def build_trunk(config: Trunk) -> Backbone:
    """Images float [B, 3, H, W] -> features float [B, feature_width], on the CPU.

    With weights as published papers initialise them, or those of `pretrained`. Raises BadInput.
    """
    trunk = FAMILIES[config.family](config)
    if config.pretrained:
        load_pretrained(trunk, config.pretrained)
    return trunk
