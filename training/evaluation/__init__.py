"""How good what has been learned is: k-NN and a linear probe on frozen features, top-1 and top-5 of a classifier."""

from training.evaluation.classifier import evaluate_classifier
from training.evaluation.features import extract_features
from training.evaluation.knn import evaluate_backbone, evaluate_pixels, knn_accuracy
from training.evaluation.probe import linear_probe, probe_pixels
from training.evaluation.while_training import evaluate

__all__ = ["evaluate", "evaluate_backbone", "evaluate_classifier", "evaluate_pixels", "extract_features",
           "knn_accuracy", "linear_probe", "probe_pixels"]
