"""What every trunk is, whatever its family."""

from torch import nn


class Backbone(nn.Module):
    """Images float [B, 3, H, W] -> features float [B, feature_width]."""

    feature_width: int
    cut_off: str
    """What the names of those weights begin with that torchvision's network has beside."""
