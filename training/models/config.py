"""What is trained: options of `model.*`, under VISSL's names. Imports no torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from training.config import Config


class Trunk(Config):
    """A ResNet (He et al., arXiv 1512.03385) in torchvision's layout, without its classifier."""

    name: Literal["resnet"] = Field("resnet", description="family of trunks: a module of training/models")
    depth: Literal[18, 34, 50, 101, 152] = Field(50, description="layers, as the paper counts them")
    width_multiplier: float = Field(
        1.0, ge=1 / 64, description="factor on every layer's channels, rounded down: 2 is SwAV's RN50-w2, "
        "0.5 a small one; 1/64 leaves the first stage one channel")
    stem: Literal["7x7", "3x3", "3x3/2"] = Field(
        "7x7", description="first convolution: 7x7 with stride 2 and a max-pool, as published, which shrinks "
        "an image's side to a quarter; or 3x3 with stride 1 and no pooling, for images of 32 to 64 pixels "
        "(SimCLR, arXiv 2002.05709, appendix B.9); or 3x3/2, the same with stride 2, at a quarter of the cost")

    @property
    def feature_width(self) -> int:
        """Channels of the last stage, which is the width of the pooled features."""
        return int(512 * self.width_multiplier) * (4 if self.depth >= 50 else 1)


class Head(Config):
    """SwAV's projection and prototypes (arXiv 2006.09882, section 4.1); VISSL's swav_head."""

    dims: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0, 2048, 128), min_length=2, description="widths from the trunk's features to the embedding; a first "
        "entry of 0 stands for the trunk's feature width, whatever it is")
    use_bn: bool = Field(True, description="BatchNorm after every linear layer but the last")
    num_clusters: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        (3000,), min_length=1, description="K, the number of prototypes, of each prototype head; heads share "
        "the projection")

    @model_validator(mode="after")
    def _widths_are_positive(self) -> Self:
        if 0 in self.dims[1:]:
            raise ValueError("dims of 1 or more; only the first may be 0, for the trunk's feature width")
        return self


class Model(Config):
    """A trunk, which is kept, and the head that trains it."""

    trunk: Trunk = Field(Trunk(), description="what gives features")
    head: Head = Field(Head(), description="what the loss sees")

    @property
    def head_dims(self) -> tuple[int, ...]:
        """`head.dims` with the trunk's feature width filled in."""
        return (self.trunk.feature_width, *self.head.dims[1:])

    @model_validator(mode="after")
    def _head_fits_trunk(self) -> Self:
        width = self.trunk.feature_width
        if self.head.dims[0] not in (0, width):
            raise ValueError(f"head.dims to begin with {width}, the width of this trunk's features (or 0 for "
                             f"whatever it is), not {self.head.dims[0]}")
        return self
