"""The small network of PyTorch's CIFAR-10 tutorial, after LeCun et al., 1998, without its last layer."""

import torch
from torch import Tensor, nn

from training.models.backbone import Backbone
from training.models.trunk_config import FEATURES, Trunk


class LeNet(Backbone):
    """Images float [B, 3, H, W] -> features float [B, 84]. Made for 32 pixels; others are averaged to 5 x 5 places."""

    cut_off = "fc3."
    feature_width = FEATURES["lenet"]

    def __init__(self, config: Trunk) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.avgpool = nn.AdaptiveAvgPool2d(5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, self.feature_width)

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv1(images)))
        x = self.pool(self.relu(self.conv2(x)))
        x = self.relu(self.fc1(torch.flatten(self.avgpool(x), 1)))
        features: Tensor = self.relu(self.fc2(x))
        return features
