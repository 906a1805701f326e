"""What images are trained on, and what becomes of them: options of `data.*`. Imports no torch."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from training.config import Config, nearest
from training.data.transforms_config import PRESETS, Transforms

CIFAR10_TRAIN, CIFAR10_SIDE = 50_000, 32  # images to train on, and their side in pixels


class Synthetic(Config):
    """The data set made on the spot: every class is a shape with a texture (training/data/synthetic.py)."""

    num_train: int = Field(4096, gt=0, description="images to train on")
    num_val: int = Field(1024, gt=0, description="images to evaluate on, drawn apart from the others")
    num_shapes: int = Field(4, ge=1, le=4, description="the first so many of disc, square, triangle, cross")
    num_textures: int = Field(4, ge=1, le=4, description="the first so many of plain, stripes, checks, grid")
    seed: int = Field(0, ge=0, description="from which every peer makes the same images")


class Data(Config):
    """Where images come from, and the views that are made of them."""

    dataset: Literal["synthetic", "image_folder", "cifar10", "shards"] = Field(
        "image_folder", description="made on the spot; or each volunteer's own folder: of JPEG and PNG files, of "
        "CIFAR-10's published python batches, of tar shards")
    image_size: int = Field(
        256, ge=8, description="side in pixels of the synthetic images; the others keep the size that they have")
    num_classes: int | None = Field(
        None, gt=1, description="classes to tell apart, for a classifier; the folder's must be as many; none: the "
        "data set's own, where that is known beforehand (synthetic, cifar10)")
    num_images: int = Field(
        1_281_167, gt=0, description="images of one pass, from which the schedule counts passes: ImageNet's, or as "
        "many as all volunteers' folders or shards hold apart; synthetic and cifar10 know their own")
    synthetic: Synthetic = Field(Synthetic(), description="the data set made on the spot")
    transforms: Transforms = Field(
        Transforms(), description="the views, or the name of a published variant, which may also stand as `preset` "
        f"among what is to differ from it: {', '.join(PRESETS)}")

    @property
    def images_per_pass(self) -> int:
        """Images of one pass over the data, for the schedule."""
        return {"synthetic": self.synthetic.num_train, "cifar10": CIFAR10_TRAIN}.get(self.dataset, self.num_images)

    @property
    def known_classes(self) -> int | None:
        """How many classes there are, where that is known before any image is seen."""
        if self.dataset == "synthetic":
            return self.synthetic.num_shapes * self.synthetic.num_textures
        return 10 if self.dataset == "cifar10" else self.num_classes

    @property
    def known_side(self) -> int | None:
        """Side of the images in pixels, where that is known before any image is seen."""
        return {"synthetic": self.image_size, "cifar10": CIFAR10_SIDE}.get(self.dataset)

    @field_validator("transforms", mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        """A published variant by name, or a table whose `preset` names one that the rest is laid over."""
        table = {"preset": value} if isinstance(value, str) else value
        if not isinstance(table, dict) or "preset" not in table:
            return value
        name, known = str(table["preset"]), list(PRESETS)
        if name not in PRESETS:
            raise ValueError(f"one of {', '.join(known)}. {nearest(name, known)}".rstrip())
        return PRESETS[name] | {key: setting for key, setting in table.items() if key != "preset"}

    @model_validator(mode="after")
    def _classes_are_as_many_as_there_are(self) -> Self:
        if self.num_classes not in (None, self.known_classes):
            raise ValueError(f"num_classes = {self.known_classes}, which {self.dataset} has")
        return self
