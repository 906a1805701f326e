"""Encoded images, JPEG or PNG, to pixels."""

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import center_crop

from training.data.crops import resize
from training.data.transforms_config import Interpolation


def decode(encoded: bytes) -> Tensor:
    """RGB, uint8 [3, H, W], turned as EXIF says; of 16 bits the upper 8. Raises RuntimeError or ValueError."""
    buffer = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    image: Tensor = decode_image(buffer, mode=ImageReadMode.RGB, apply_exif_orientation=True)
    if image.ndim != 3:
        raise ValueError("an animation")
    return (image.to(torch.int32) >> 8).to(torch.uint8) if image.dtype == torch.uint16 else image


def middle(images: Tensor, resize_size: int, crop_size: int, interpolation: Interpolation) -> Tensor:
    """uint8 [B, 3, H, W] with the shortest side brought to `resize_size`, and of that the central square."""
    height, width = images.shape[2:]
    shortest = min(height, width)
    size = (resize_size * height // shortest, resize_size * width // shortest)
    resized = images if size == (height, width) else resize(images, size, interpolation)
    cropped: Tensor = center_crop(resized, [crop_size, crop_size])
    return cropped
