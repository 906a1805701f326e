"""The figure that a run is followed by: cheap enough to be taken every so many epochs."""

from training.data.sources import Source
from training.evaluation.classifier import evaluate_classifier
from training.evaluation.knn import evaluate_backbone
from training.objectives.classification import Classification
from training.objectives.objective import Objective
from training.recipe import Training


def evaluate(objective: Objective, train: Source, val: Source, training: Training) -> dict[str, float]:
    """Top-1, top-5 and loss on val of a classifier; of anything else, k-NN of its backbone's features.

    Raises BadInput as `evaluate_classifier` and `evaluate_backbone` do.
    """
    config, transforms = training.evaluation, training.data.transforms
    if isinstance(objective, Classification):
        return evaluate_classifier(objective, val, config, transforms)
    return evaluate_backbone(objective.backbone, train, val, config, transforms)
