"""RegNetY trunks, torchvision's: the state dict fits its regnet of the same name, but for the classifier."""

from collections import OrderedDict

from torch import nn
from torchvision.models.regnet import BlockParams, RegNet

from training.models.backbone import Backbone
from training.models.norm import norm_layer
from training.models.recompute import Recomputed
from training.models.regnet_widths import stages
from training.models.trunk_config import Trunk

SQUEEZE_RATIO = 0.25  # of squeeze-and-excitation: what makes a RegNetX a RegNetY


def build(config: Trunk) -> Backbone:
    """Images float [B, 3, H, W] -> features float [B, feature_width], averaged over place."""
    blocks, widths, group_widths = zip(*stages(config.regnet), strict=True)
    trunk: Backbone = RegNet(
        BlockParams(depths=blocks, widths=widths, group_widths=group_widths, strides=[2] * len(blocks),
                    bottleneck_multipliers=[1.0] * len(blocks), se_ratio=SQUEEZE_RATIO),
        norm_layer=norm_layer(config.norm), num_classes=1)
    trunk.fc = nn.Identity()
    trunk.cut_off = "fc."
    trunk.feature_width = widths[-1]
    if config.activation_checkpointing:
        stages_of_blocks = trunk.get_submodule("trunk_output")
        for name, stage in stages_of_blocks.named_children():
            setattr(stages_of_blocks, name, Recomputed(OrderedDict(stage.named_children())))
    return trunk
