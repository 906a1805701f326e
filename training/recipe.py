"""What is trained and how, apart from how peers agree: the part of an experiment that is plain PyTorch.

Imports no torch.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, Self, TypeVar

from pydantic import Field, model_validator

from training.config import Config
from training.data.config import Data
from training.evaluation_config import Evaluation
from training.models.config import Model, SwavModel
from training.objectives.config import CrossEntropy, SwavLoss
from training.optimizers.config import Optimizer


class Training(Config):
    """Everything that decides what an update does; equal on all peers. Each objective adds its model and loss."""

    refused: ClassVar[Mapping[str, str]] = {
        "distributed": "How many processes there are is decided at the start: by volunteers that join, by torchrun or "
        "by Slurm.",
        "hydra": "There is no Hydra here: overrides are dotted keys.",
    }

    name: str = Field(
        pattern="^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64,
        description="the experiment's name, which begins its run id: letters, digits, - and _")
    objective: str = Field(description="what is trained for: a module of training/objectives")
    seed: int = Field(
        0, ge=0, lt=2**63, description="of the initial parameters; the order of the data comes from each peer's "
        "identity instead")
    model: Model = Field(Model(), description="what is trained")
    data: Data = Field(Data(), description="images and their views")
    optimizer: Optimizer = Field(description="how gradients become an update")
    evaluation: Evaluation = Field(Evaluation(), description="how the backbone is judged")

    @model_validator(mode="after")
    def _images_suit_the_trunk(self) -> Self:
        side, sizes = self.model.trunk.image_side, self.data.transforms.size_crops
        if side and set(sizes) != {side}:
            raise ValueError(f"data.transforms.size_crops of {side}, the only size that {self.model.trunk.name} takes, "
                             f"not {list(sizes)}")
        if side and self.evaluation.crop_size != side:
            raise ValueError(f"evaluation.crop_size = {side}, the only size that {self.model.trunk.name} takes, not "
                             f"{self.evaluation.crop_size}")
        return self


Trained = TypeVar("Trained", bound=Training)


def from_scratch(training: Trained) -> Trained:
    """`training` without the file that its trunk begins from, which may not be here: for whom all weights are given."""
    trunk = training.model.trunk.model_copy(update={"pretrained": ""})
    return training.model_copy(update={"model": training.model.model_copy(update={"trunk": trunk})})


class SwavTraining(Training):
    """SwAV: a trunk that learns without labels, from crops that predict each other's cluster assignments."""

    objective: Literal["swav"] = Field("swav", description="what is trained for: a module of training/objectives")
    model: SwavModel = Field(SwavModel(), description="trunk and head")
    loss: SwavLoss = Field(SwavLoss(), description="the objective's loss")

    @model_validator(mode="after")
    def _queue_holds_no_image_twice(self) -> Self:
        length, images = self.loss.queue.queue_length, self.data.images_per_pass
        if length > images:
            raise ValueError(f"loss.queue.queue_length of at most {images}, the images of one pass, not {length}")
        return self

    @model_validator(mode="after")
    def _crops_suit_the_loss(self) -> Self:
        crops = self.data.transforms.total_num_crops
        if crops < 2:
            raise ValueError("data.transforms.total_num_crops of 2 or more, as each crop predicts the others")
        if max(self.loss.crops_for_assign) >= crops:
            raise ValueError(f"loss.crops_for_assign within 0 to {crops - 1}, as data.transforms makes {crops} "
                             f"crops, not {list(self.loss.crops_for_assign)}")
        return self


class ClassificationTraining(Training):
    """Supervised: a trunk and a linear classifier on its features."""

    objective: Literal["classification"] = Field(
        "classification", description="what is trained for: a module of training/objectives")
    loss: CrossEntropy = Field(CrossEntropy(), description="the objective's loss")

    @model_validator(mode="after")
    def _one_crop_and_classes(self) -> Self:
        if self.data.transforms.total_num_crops != 1:
            raise ValueError("data.transforms.total_num_crops = 1, as an image has one class whatever the crop "
                             "(data.transforms=imagenet_train_176, say)")
        if self.data.num_classes is None:
            raise ValueError("data.num_classes, the width of the classifier")
        return self
