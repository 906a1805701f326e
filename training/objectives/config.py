"""What is minimised: options of `loss.*`, under VISSL's names. Imports no torch."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from training.config import Config


class Queue(Config):
    """Embeddings of earlier batches, which take part in the assignment: for batches too small to fill prototypes."""

    refused: ClassVar[Mapping[str, str]] = {
        "local_queue_length": "It is loss.queue.queue_length over the processes of a volunteer."}

    start_iter: int = Field(
        0, ge=0, description="collaborative epoch from which embeddings are gathered; they count once the queue is "
        "full (SwAV, arXiv 2006.09882, section 4.1, starts when the loss has begun to fall)")
    queue_length: int = Field(
        0, ge=0, description="embeddings per assigned crop, over all processes of a volunteer; lowered to a multiple "
        "of their batch; 0 for none")



class SwavLoss(Config):
    """The swapped prediction of cluster assignments (SwAV, arXiv 2006.09882, equations 1 to 5)."""

    refused: ClassVar[Mapping[str, str]] = {  # VISSL's keys that follow from others
        "embedding_dim": "It is the last of model.head.dims.",
        "num_prototypes": "They are model.head.num_clusters.",
        "num_crops": "It is data.transforms.total_num_crops.",
        "output_dir": "It is the folder of the run's state, each volunteer's own.",
    }

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
    power_law_exponent: float = Field(
        0.0, ge=0, description="p: prototype i, from 0, gets a share of the images proportional to 1 / (i + 1)^p; 0 "
        "shares evenly, as published; for data in which some things are far more frequent than others")
    queue: Queue = Field(Queue(), description="embeddings of earlier batches")

    @model_validator(mode="after")
    def _crops_are_distinct(self) -> Self:
        if len(set(self.crops_for_assign)) < len(self.crops_for_assign):
            raise ValueError("crops_for_assign without repetition")
        return self


class CrossEntropy(Config):
    """Cross-entropy of a linear classifier's prediction with the image's class."""

    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of the target spread evenly over all classes (Szegedy et al., arXiv "
        "1512.00567, section 7)")
