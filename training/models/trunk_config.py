"""What gives features: options of `model.trunk.*`, under VISSL's names. Imports no torch."""

from typing import Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from training.config import Config, nearest
from training.models.regnet_widths import PRESETS, Parameters, stages

DEPTHS = (18, 34, 50, 101, 152, 200)
FEATURES = {"lenet": 84, "vgg16": 4096, "vgg16_bn": 4096, "vit_b_16": 768}
NAMES = ("resnet", "regnet", *PRESETS, *FEATURES)
TORCHVISION = "torchvision:"

_OF_CONVOLUTIONS = {"norm", "activation_checkpointing"}
_OF_RESNET = {"depth", "width_multiplier", "groups", "width_per_group", "stem"} | _OF_CONVOLUTIONS
_OF_REGNET = {"depth", "w_0", "w_a", "w_m", "group_width"}


class Trunk(Config):
    """What turns an image into features: a published network without its classifier."""

    name: str = Field(
        "resnet", description="resnet (He et al., arXiv 1512.03385) by depth; regnet (RegNetY, arXiv 2003.13678) by "
        f"depth, w_0, w_a, w_m and group_width; one of {', '.join(NAMES[2:])}; or torchvision:NAME for any other "
        "classifier of torchvision's")
    depth: int | None = Field(
        None, ge=1, le=1000, description=f"layers of a resnet as the paper counts them: one of {DEPTHS}, 50 if not "
        "given; or blocks of a regnet")
    width_multiplier: float = Field(
        1.0, ge=1 / 64, le=64, description="factor on every layer's channels of a resnet: 2 is SwAV's RN50-w2, 0.5 a "
        "small one; a multiple of 1/64, which leaves the first stage one channel")
    groups: int = Field(
        1, ge=1, description="groups of the 3x3 convolutions of a resnet (ResNeXt, arXiv 1611.05431): 32 with "
        "width_per_group 4 is resnext50_32x4d")
    width_per_group: int = Field(
        64, ge=1, description="channels of such a group in a resnet's first stage; 128 with groups 1 is "
        "torchvision's wide_resnet50_2")
    stem: Literal["7x7", "3x3", "3x3/2"] = Field(
        "7x7", description="first convolution of a resnet: 7x7 with stride 2 and a max-pool, as published, which "
        "shrinks an image's side to a quarter; or 3x3 with stride 1 and no pooling, for images of 32 to 64 pixels "
        "(SimCLR, arXiv 2002.05709, appendix B.9); or 3x3/2, the same with stride 2, at a quarter of the cost")
    w_0: int | None = Field(None, ge=8, multiple_of=8, description="channels of a regnet's first block")
    w_a: float | None = Field(None, ge=0, description="channels that a regnet's line of widths gains per block")
    w_m: float | None = Field(None, gt=1, description="factor between widths of a regnet's stages, before rounding")
    group_width: int | None = Field(
        None, ge=1, description="channels of a group of a regnet's 3x3 convolutions; stages are widened or narrowed "
        "to whole groups")
    norm: Literal["batch", "group", "layer"] = Field(
        "batch", description="normalisation of a resnet or regnet: over the batch; over 32 groups of channels (arXiv "
        "1803.08494), or as many as divide them; or over all channels at once")
    activation_checkpointing: bool = Field(
        False, description="keep only what goes into each block of a resnet or regnet, and compute the rest again "
        "for the backward pass: less memory for about a third more time")
    pretrained: str = Field(
        "", description="path to a .safetensors file with the trunk's weights in torchvision's layout, read wherever "
        "the trunk is built; a classifier in it is left out")

    @property
    def family(self) -> Literal["resnet", "regnet", "lenet", "torchvision"]:
        """The module of training/models that builds it."""
        if self.name == "regnet" or self.name in PRESETS:
            return "regnet"
        return "resnet" if self.name == "resnet" else "lenet" if self.name == "lenet" else "torchvision"

    @property
    def layers(self) -> int:
        """A resnet's depth."""
        return self.depth or 50

    @property
    def regnet(self) -> Parameters:
        """A regnet's parameters, by its name or as given."""
        if self.name in PRESETS:
            return PRESETS[self.name]
        return Parameters(*(getattr(self, name) for name in Parameters._fields))

    @property
    def feature_width(self) -> int | None:
        """Channels of the pooled features; None for torchvision:NAME, where only the built trunk knows."""
        if self.family == "resnet":
            return int(512 * self.width_multiplier) * (4 if self.layers >= 50 else 1)
        return stages(self.regnet)[-1].width if self.family == "regnet" else FEATURES.get(self.name)

    @property
    def image_side(self) -> int | None:
        """The only side of images, in pixels, that it takes; None where it takes any."""
        transformer = self.name.removeprefix(TORCHVISION).startswith(("vit_", "maxvit_"))
        return 224 if transformer else None

    @field_validator("name")
    @classmethod
    def _name_is_known(cls, name: str) -> str:
        if name not in NAMES and not name.startswith(TORCHVISION):
            raise ValueError(f"one of {', '.join(NAMES)}, or torchvision:NAME for another classifier of torchvision's. "
                             + nearest(name, NAMES))
        return name

    @field_validator("depth")
    @classmethod
    def _resnet_of_that_depth_exists(cls, depth: int | None, info: ValidationInfo) -> int | None:
        if info.data.get("name") == "resnet" and depth not in (None, *DEPTHS):
            raise ValueError(f"one of {', '.join(map(str, DEPTHS))} for a resnet")
        return depth

    @field_validator("width_multiplier")
    @classmethod
    def _channels_are_whole(cls, multiplier: float) -> float:
        if not (64 * multiplier).is_integer():
            raise ValueError(f"a multiple of 1/64, as the first stage's 64 channels would be {64 * multiplier:g}")
        return multiplier

    @model_validator(mode="after")
    def _only_what_its_family_uses(self) -> Self:
        used = {"resnet": _OF_RESNET, "regnet": _OF_CONVOLUTIONS | (_OF_REGNET if self.name == "regnet" else set())}
        for name, field in type(self).model_fields.items():
            unused = name not in used.get(self.family, set()) | {"name", "pretrained"}
            if unused and getattr(self, name) != field.default:
                raise ValueError(f"no {name}, for which {self.name!r} has no use; where a recipe gives it, "
                                 f'model.trunk={{name="{self.name}"}} replaces the trunk as a whole')
        return self

    @model_validator(mode="after")
    def _groups_fit_the_resnet(self) -> Self:
        if self.family != "resnet":
            return self
        if self.layers < 50 and (self.groups, self.width_per_group) != (1, 64):
            raise ValueError(f"depth of 50 or more with groups or width_per_group, not {self.layers}, whose blocks are "
                             "not grouped")
        channels = self.width_multiplier * self.width_per_group
        if not channels.is_integer():
            raise ValueError("width_multiplier * width_per_group a whole number, the channels of each of the first "
                             f"stage's groups, not {channels:g}")
        return self

    @model_validator(mode="after")
    def _regnet_is_complete(self) -> Self:
        absent = [name for name in sorted(_OF_REGNET) if getattr(self, name) is None]
        if self.name == "regnet" and absent:
            raise ValueError(f"{', '.join(absent)} as well, or the name of a published one: {', '.join(PRESETS)}")
        return self
