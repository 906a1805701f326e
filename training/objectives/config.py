"""What is minimised: options of `loss.*`, under VISSL's names. Imports no torch."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from training.config import Config


class SwavLoss(Config):
    """The swapped prediction of cluster assignments (SwAV, arXiv 2006.09882, equations 1 to 5)."""

    temperature: float = Field(
        0.1, gt=0, description="divides the scores in the softmax of predictions (equation 2)")
    epsilon: float = Field(
        0.05, gt=0, description="weight of the assignments' entropy (equation 3): smaller is sharper; lower it "
        "where the loss stays at ln K; far below 0.03 it wants use_double_precision")
    num_iters: int = Field(3, ge=1, description="iterations of Sinkhorn-Knopp")
    use_double_precision: bool = Field(False, description="Sinkhorn-Knopp in float64 rather than float32")
    normalize_last_layer: bool = Field(
        True, description="bring every prototype back to length 1 after each update")
    crops_for_assign: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0, 1), min_length=1, description="crops whose assignments all other crops predict: the large ones, "
        "counted from 0 in the order of data.transforms")
    temp_hard_assignment_iters: int = Field(
        0, ge=0, description="collaborative epochs, from the first, in which an assignment is rounded to its "
        "likeliest prototype")
    freeze_prototypes_iters: int = Field(
        0, ge=0, description="collaborative epochs, from the first, in which prototypes do not move, lest the "
        "loss stay at ln K; the paper freezes them for one pass over the data")

    @model_validator(mode="after")
    def _crops_are_distinct(self) -> Self:
        if len(set(self.crops_for_assign)) < len(self.crops_for_assign):
            raise ValueError("crops_for_assign without repetition")
        return self
