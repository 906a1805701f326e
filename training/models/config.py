"""What is trained: options of `model.*`, under VISSL's names. Imports no torch."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from training.config import Config
from training.models.trunk_config import Trunk


class SyncBn(Config):
    """BatchNorm over the batches of a peer's processes; VISSL's SYNC_BN_CONFIG. With one process it is BatchNorm."""

    convert_bn_to_sync_bn: bool = Field(False, description="compute the statistics of BatchNorm over several GPUs")
    sync_bn_type: Literal["pytorch", "apex"] = Field(
        "pytorch", description="whose; apex is accepted and means pytorch's, which has replaced it")
    group_size: int = Field(
        -1, ge=-1, description="processes, of consecutive ranks, that share statistics: -1 those of one machine, "
        "0 all of a peer's, or that many, of which the number of processes is a multiple; all where there are fewer")


class Amp(Config):
    """Mixed precision; VISSL's AMP_PARAMS."""

    refused: ClassVar[Mapping[str, str]] = {
        "keep_batchnorm_fp32": "Leave it out: autocast leaves BatchNorm's weights and statistics in float32.",
        "master_weights": "Leave it out: under autocast weights are float32 always.",
        "loss_scale": "Leave it out: with dtype fp16 the loss is scaled dynamically, with bf16 it need not be.",
    }

    use_amp: bool = Field(False, description="compute convolutions and matrix products in `dtype`")
    opt_level: str = Field(
        "O1", description="Apex's name for what torch.autocast does: weights stay in float32, and what needs the "
        "range is computed there")
    dtype: Literal["bf16", "fp16"] = Field(
        "bf16", description="bf16 has the range of float32; fp16, for GPUs without bf16, needs its loss scaled")

    tf32: bool = Field(
        False, description="let GPUs round the factors of what stays in float32, convolutions and matrix products, to "
        "TF32's 10 bits of mantissa: faster")

    @field_validator("opt_level")
    @classmethod
    def _weights_stay_in_float32(cls, level: str) -> str:
        if level == "O0":
            raise ValueError("the level O1; for O0, which is float32 throughout, use_amp=false")
        if level != "O1":
            raise ValueError("the level O1: others keep weights in half precision, in which small updates and averages "
                             "with peers are rounded away")
        return level


class Model(Config):
    """A trunk, and how it is computed."""

    trunk: Trunk = Field(Trunk(), description="what gives features")
    sync_bn: SyncBn = Field(SyncBn(), description="BatchNorm over several processes")
    amp: Amp = Field(Amp(), description="mixed precision")
    single_pass_every_crop: bool = Field(
        False, description="one pass of the trunk for each crop, rather than one for all crops of a size: less "
        "memory, and BatchNorm's statistics of each crop by itself")


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


class SwavModel(Model):
    """A trunk, which is kept, and the head that trains it."""

    head: Head = Field(Head(), description="what the loss sees")

    @property
    def head_dims(self) -> tuple[int, ...]:
        """`head.dims` with the trunk's feature width filled in, where it is known: see Trunk.feature_width."""
        return (self.trunk.feature_width or self.head.dims[0], *self.head.dims[1:])

    @model_validator(mode="after")
    def _head_fits_trunk(self) -> Self:
        width = self.trunk.feature_width
        if width and self.head.dims[0] not in (0, width):
            raise ValueError(f"head.dims to begin with {width}, the width of this trunk's features (or 0 for "
                             f"whatever it is), not {self.head.dims[0]}")
        return self
