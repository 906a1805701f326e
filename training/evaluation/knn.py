"""Weighted k-NN on frozen features, beside k-NN on the raw pixels (Wu et al., arXiv 1805.01978, section 3.4)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from training.data.sources import Source
from training.data.transforms_config import Transforms
from training.evaluation.features import IMAGENET, Splits, backbone_features, device_of, pixel_features
from training.evaluation_config import Evaluation

BANK_ROWS, QUERY_ROWS = 65536, 256  # as N times M similarities may not fit in memory: 64 MiB of them at once
CPU = torch.device("cpu")


def evaluate_backbone(backbone: nn.Module, train: Source, val: Source, config: Evaluation,
                      transforms: Transforms = IMAGENET) -> dict[str, float]:
    """Accuracy in [0, 1] of k-NN on the val split with the train split's features: {"knn_accuracy": ...}.

    `backbone` maps images, resized and normalised as `transforms` says, float32 [B, 3, S, S], to features [B, F] on
    its own device. It is run in eval mode; each module is left in the mode it was in. Raises BadInput for images
    without classes, and for a class that only val has.
    """
    return knn_figures(backbone_features(backbone, train, val, config, transforms), config, device_of(backbone))


def evaluate_pixels(train: Source, val: Source, config: Evaluation) -> dict[str, float]:
    """The same figure with the pixels themselves as features: what no backbone at all would score."""
    return knn_figures(pixel_features(train, val, config), config)


def knn_figures(splits: Splits, config: Evaluation, device: torch.device = CPU) -> dict[str, float]:
    """{"knn_accuracy": ...} of features that are there already, with the work done on `device`."""
    train, val = splits
    return {"knn_accuracy": knn_accuracy(*train, *val, k=config.knn_k, temperature=config.knn_temperature,
                                         device=device)}


def knn_accuracy(train_features: Tensor, train_labels: Tensor, val_features: Tensor, val_labels: Tensor, *,
                 k: int, temperature: float, device: torch.device = CPU) -> float:
    """Share of the val features [M, F] whose class is the one voted by the k nearest train features [N, F].

    Nearest by cosine similarity s; each votes with weight exp(s / temperature).
    """
    k, classes, correct = min(k, len(train_features)), int(train_labels.max()) + 1, 0
    nearest = _nearest(val_features, train_features, k, device)
    for (similarity, neighbours), truth in zip(nearest, torch.split(val_labels, QUERY_ROWS), strict=True):
        weights = ((similarity - 1) / temperature).exp()
        votes = torch.zeros(len(truth), classes).scatter_add_(1, train_labels[neighbours], weights)
        correct += int((votes.argmax(dim=1) == truth).sum())
    return correct / len(val_labels)


def _nearest(queries: Tensor, bank: Tensor, k: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Cosine similarities [m, k] to the k nearest of `bank`, and which they are, int64 [m, k], per part of `queries`.

    A part of the bank at a time goes to `device`, and a normalised copy of the whole is never made.
    """
    parts = [normalize(part.to(device), dim=1) for part in torch.split(queries, QUERY_ROWS)]
    best = [(part.new_empty(len(part), 0), torch.empty(len(part), 0, dtype=torch.int64, device=device))
            for part in parts]
    for start in range(0, len(bank), BANK_ROWS):
        rows = normalize(bank[start:start + BANK_ROWS].to(device), dim=1)
        for number, part in enumerate(parts):
            similarity, index = (part @ rows.T).topk(min(k, len(rows)), dim=1)
            candidates, rows_of = (torch.cat(pair, dim=1)
                                   for pair in zip(best[number], (similarity, index + start), strict=True))
            kept = candidates.topk(min(k, candidates.shape[1]), dim=1)
            best[number] = kept.values, rows_of.gather(1, kept.indices)
    return [(similarity.cpu(), index.cpu()) for similarity, index in best]
