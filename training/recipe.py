"""What is trained and how, apart from how peers agree: the part of an experiment that is plain PyTorch.

Imports no torch.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from training.config import Config
from training.data.config import Data
from training.evaluation_config import Evaluation
from training.models.config import Model
from training.objectives.config import SwavLoss
from training.optimizers.config import Optimizer


class Training(Config):
    """Everything that decides what an update does; equal on all peers."""

    name: str = Field(
        pattern="^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64,
        description="the experiment's name, which begins its run id: letters, digits, - and _")
    objective: Literal["swav"] = Field("swav", description="what is trained for: a module of training/objectives")
    seed: int = Field(
        0, ge=0, lt=2**63, description="of the initial parameters; the order of the data comes from each peer's "
        "identity instead")
    model: Model = Field(Model(), description="trunk and head")
    loss: SwavLoss = Field(SwavLoss(), description="the objective's loss")
    data: Data = Field(Data(), description="images and their views")
    optimizer: Optimizer = Field(description="how gradients become an update")
    evaluation: Evaluation = Field(Evaluation(), description="how the backbone is judged")

    @model_validator(mode="after")
    def _crops_suit_the_loss(self) -> Self:
        crops = self.data.transforms.total_num_crops
        if crops < 2:
            raise ValueError("data.transforms.total_num_crops of 2 or more, as each crop predicts the others")
        if max(self.loss.crops_for_assign) >= crops:
            raise ValueError(f"loss.crops_for_assign within 0 to {crops - 1}, as data.transforms makes {crops} "
                             f"crops, not {list(self.loss.crops_for_assign)}")
        return self
