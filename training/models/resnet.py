"""ResNet trunks of torchvision's blocks: the state dict fits torchvision's resnet, but for its classifier."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from training.models.backbone import Backbone
from training.models.norm import norm_layer
from training.models.recompute import Recomputed
from training.models.trunk_config import Trunk

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3),
          200: (3, 24, 36, 3)}


class ResNet(Backbone):
    """Images float [B, 3, H, W] -> features float [B, feature_width], averaged over place."""

    cut_off = "fc."

    def __init__(self, config: Trunk) -> None:
        super().__init__()
        block = Bottleneck if config.layers >= 50 else BasicBlock
        stem, *planes = (int(width * config.width_multiplier) for width in (64, 64, 128, 256, 512))
        small = config.stem != "7x7"
        self.conv1 = (nn.Conv2d(3, stem, 3, stride=2 if config.stem == "3x3/2" else 1, padding=1, bias=False) if small
                      else nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False))
        self.bn1 = norm_layer(config.norm)(stem)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
        inputs = (stem, *(width * block.expansion for width in planes))
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            _stage(config, inputs[i], planes[i], blocks, stride=1 if i == 0 else 2)
            for i, blocks in enumerate(BLOCKS[config.layers]))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.feature_width = inputs[-1]
        self._initialise()

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return torch.flatten(self.avgpool(x), 1)

    def _initialise(self) -> None:
        """As torchvision: by fan-out (He et al., arXiv 1502.01852); a norm starts as the identity by itself."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _stage(config: Trunk, inputs: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    made = _blocks(config, inputs, planes, blocks, stride)
    return Recomputed(*made) if config.activation_checkpointing else nn.Sequential(*made)


def _blocks(config: Trunk, inputs: int, planes: int, blocks: int, stride: int) -> Iterator[nn.Module]:
    block, norm = Bottleneck if config.layers >= 50 else BasicBlock, norm_layer(config.norm)
    outputs = planes * block.expansion
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), norm(outputs))
    same = {"groups": config.groups, "base_width": config.width_per_group, "norm_layer": norm}
    yield block(inputs, planes, stride, shortcut, **same)
    for _ in range(blocks - 1):
        yield block(outputs, planes, **same)
