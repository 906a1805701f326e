"""The views that are made of images: options of `data.transforms.*`, and the published variants. Imports no torch."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from training.config import Config

Interval = tuple[float, float]
PerChannel = tuple[float, float, float]
Interpolation = Literal["bilinear", "bicubic", "triangular"]

IMAGENET_MEAN: PerChannel = (0.485, 0.456, 0.406)
IMAGENET_STD: PerChannel = (0.229, 0.224, 0.225)


class Transforms(Config):
    """Multi-crop views (SwAV, arXiv 2006.09882, appendix A); the defaults are its published ones.

    Crops come in groups of one size: `num_crops`, `size_crops` and `crop_scales` have one entry per group.
    """

    total_num_crops: int = Field(8, gt=0, description="crops per image, over all sizes: the sum of num_crops")
    num_crops: tuple[int, ...] = Field((2, 6), min_length=1, description="crops per image, of each size")
    size_crops: tuple[int, ...] = Field(
        (224, 96), min_length=1, description="side of the crops, of each size, in pixels")
    crop_scales: tuple[Interval, ...] = Field(
        ((0.14, 1.0), (0.05, 0.14)), min_length=1,
        description="bounds of a crop's area as a share of the image's, of each size")
    crop_ratio: Interval = Field(
        (3 / 4, 4 / 3), description="bounds of a crop's width over its height, drawn log-uniformly")
    interpolation: Interpolation = Field(
        "bilinear", description="how crops are brought to size, always antialiased as PIL does it: bicubic, or "
        "bilinear, for which triangular is DALI's name: a triangle as wide as the coarser of the two grids")
    flip_probability: float = Field(
        0.5, ge=0, le=1, description="chance that a crop is mirrored left to right")
    color_jitter_probability: float = Field(
        0.8, ge=0, le=1, description="chance that a crop's colours are jittered")
    color_jitter_strength: float = Field(
        1.0, ge=0, le=2.5, description="s: brightness, contrast and saturation change by a factor within "
        "1 ± 0.8 s (never below 0), hue by up to 0.2 s of a turn (SimCLR, arXiv 2002.05709, appendix A)")
    grayscale_probability: float = Field(0.2, ge=0, le=1, description="chance that a crop loses its colours")
    blur_probability: float = Field(0.5, ge=0, le=1, description="chance that a crop is blurred")
    blur_radius: Interval = Field(
        (0.1, 2.0), description="bounds of the blur's standard deviation, in pixels of the crop; meant for "
        "crops of 224 pixels: lower it with the size")
    mean: PerChannel = Field(
        IMAGENET_MEAN, description="taken from red, green and blue in [0, 1]; ImageNet's by default")
    std: PerChannel = Field(
        IMAGENET_STD, description="by which red, green and blue are then divided; ImageNet's by default")

    @model_validator(mode="after")
    def _groups_agree(self) -> Self:
        if not len(self.num_crops) == len(self.size_crops) == len(self.crop_scales):
            raise ValueError("num_crops, size_crops and crop_scales with one entry per size of crop")
        if self.total_num_crops != sum(self.num_crops):
            raise ValueError(f"total_num_crops = {sum(self.num_crops)}, the sum of num_crops")
        if min(self.num_crops) < 1 or min(self.size_crops) < 1:
            raise ValueError("num_crops and size_crops of 1 or more")
        if min(self.std) <= 0:
            raise ValueError("std above 0")
        return self

    @model_validator(mode="after")
    def _intervals_ascend(self) -> Self:
        intervals = [("crop_ratio", self.crop_ratio), ("blur_radius", self.blur_radius)]
        for name, (low, high) in intervals + [("crop_scales", scale) for scale in self.crop_scales]:
            if not 0 < low <= high:
                raise ValueError(f"{name} as [low, high] with 0 < low <= high")
        if max(high for _, high in self.crop_scales) > 1:
            raise ValueError("crop_scales of at most 1, the whole image")
        return self


_COLOURS_AS_THEY_ARE = {"color_jitter_probability": 0.0, "grayscale_probability": 0.0, "blur_probability": 0.0}

# The variants that the paper and VISSL publish, and what classifiers train on; what is not named keeps its default.
PRESETS: dict[str, dict[str, Any]] = {
    "multicrop_2x224_6x96": {},
    "multicrop_2x224_4x96": {"total_num_crops": 6, "num_crops": (2, 4)},
    "multicrop_2x160_4x96": {"total_num_crops": 6, "num_crops": (2, 4), "size_crops": (160, 96)},
    "multicrop_6x160": {"total_num_crops": 6, "num_crops": (6,), "size_crops": (160,),
                        "crop_scales": ((0.14, 1.0),)},
    "multicrop_2x224": {"total_num_crops": 2, "num_crops": (2,), "size_crops": (224,),
                        "crop_scales": ((0.08, 1.0),)},
    "imagenet_train_176": {"total_num_crops": 1, "num_crops": (1,), "size_crops": (176,),
                           "crop_scales": ((0.08, 1.0),), **_COLOURS_AS_THEY_ARE},
    "cifar10_train": {"total_num_crops": 1, "num_crops": (1,), "size_crops": (32,), "crop_scales": ((1.0, 1.0),),
                      "crop_ratio": (1.0, 1.0), "flip_probability": 0.0, **_COLOURS_AS_THEY_ARE,
                      "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
}
