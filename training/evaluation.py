"""How good a backbone's features are: weighted k-NN on them, beside k-NN on the raw pixels."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from training.data.sources import Source
from training.data.views import normalise
from training.errors import BadInput
from training.evaluation_config import Evaluation

Labelled = tuple[Tensor, Tensor]  # features float32 [N, F], classes int64 [N]


def evaluate_backbone(backbone: nn.Module, train: Source, val: Source, config: Evaluation) -> dict[str, float]:
    """Accuracy in [0, 1] of k-NN on the val split with the train split's features: {"knn_accuracy": ...}.

    `backbone` maps normalised images, float32 [B, 3, S, S], to features [B, F] on its own device. It is run in
    eval mode and left in the mode it was in. Raises BadInput for images without classes.
    """
    training = backbone.training
    backbone.eval()
    try:
        return _evaluate(backbone, train, val, config, _device(backbone))
    finally:
        backbone.train(training)


def evaluate_pixels(train: Source, val: Source, config: Evaluation) -> dict[str, float]:
    """The same figure with the pixels themselves as features: what no backbone at all would score."""
    return _evaluate(nn.Flatten(), train, val, config, torch.device("cpu"))


def _evaluate(features: Callable[[Tensor], Tensor], train: Source, val: Source, config: Evaluation,
              device: torch.device) -> dict[str, float]:
    bank = extract_features(features, train, config.batch_size, device)
    queries = extract_features(features, val, config.batch_size, device)
    return {"knn_accuracy": knn_accuracy(*bank, *queries, k=config.knn_k, temperature=config.knn_temperature)}


@torch.inference_mode()
def extract_features(features: Callable[[Tensor], Tensor], source: Source, batch_size: int,
                     device: torch.device) -> Labelled:
    """Features and classes of every image that can be read, on the CPU. Raises BadInput without classes."""
    if source.labels is None:
        raise BadInput("images without classes", expected="one folder per class",
                       mend="Sort the images into such.")
    numbers = range(len(source))
    found = [features(normalise(source.images(numbers[start:start + batch_size]).to(device))).float().cpu()
             for start in numbers[::batch_size]]
    readable = torch.tensor([number not in source.skipped for number in numbers])
    return torch.cat(found)[readable], source.labels[readable]


def knn_accuracy(train_features: Tensor, train_labels: Tensor, val_features: Tensor, val_labels: Tensor, *,
                 k: int, temperature: float) -> float:
    """Share of the val features [M, F] whose class is the one voted by the k nearest train features [N, F].

    Nearest by cosine similarity s; each votes with weight exp(s / temperature) (Wu et al., arXiv 1805.01978).
    """
    bank, k = normalize(train_features, dim=1), min(k, len(train_features))
    classes, correct = int(train_labels.max()) + 1, 0
    # in parts, as N times M similarities may not fit in memory
    for part, truth in zip(torch.split(val_features, 256), torch.split(val_labels, 256), strict=True):
        similarity, neighbours = (normalize(part, dim=1) @ bank.T).topk(k, dim=1)
        weights = ((similarity - 1) / temperature).exp()
        votes = torch.zeros(len(truth), classes).scatter_add_(1, train_labels[neighbours], weights)
        correct += int((votes.argmax(dim=1) == truth).sum())
    return correct / len(val_labels)


def _device(module: nn.Module) -> torch.device:
    return next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
