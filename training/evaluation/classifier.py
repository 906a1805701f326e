"""Top-1, top-5 and loss of a classifier on labelled images, pooled by samples."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from training.data.sources import Source
from training.data.transforms_config import Transforms
from training.data.views import normalise
from training.errors import BadInput
from training.evaluation.features import IMAGENET, centre_crops, device_of, evaluating, labels_of, were_read
from training.evaluation_config import Evaluation
from training.objectives.classification import Classification


def evaluate_classifier(objective: Classification, val: Source, config: Evaluation,
                        transforms: Transforms = IMAGENET) -> dict[str, float]:
    """Of one centre crop per image: {"top1_accuracy", "top5_accuracy"} in [0, 1], {"val_loss"} in nats.

    The loss is the plain cross-entropy, whatever smoothing is trained with. Run in eval mode; each module is left
    in the mode it was in. `transforms` says how images are resized and normalised. Raises BadInput for images
    without classes, and for a class that the classifier does not have.
    """
    return figures(sums(objective, val, range(len(val)), config, transforms))


@torch.inference_mode()
def sums(objective: Classification, val: Source, numbers: range, config: Evaluation,
         transforms: Transforms = IMAGENET) -> Tensor:
    """Over the images of `numbers` that can be read: their count, top-1 hits, top-5 hits, loss; float64 [4].

    Processes that share the images among them add theirs up: range(rank, len(val), world_size) each.
    """
    device, labels = device_of(objective), labels_of(val)
    total = torch.zeros(4, dtype=torch.float64, device=device)
    with evaluating(objective):
        for part, images in centre_crops(val, numbers, config, transforms):
            readable = were_read(val, part)
            truth = labels[torch.tensor(part)][readable].to(device)
            views = normalise(images.to(device, non_blocking=True), transforms.mean, transforms.std)
            logits = objective.predict(views)[readable].float()
            _check_known(truth, logits.shape[1])
            total[0] += len(truth)
            total[1:3] += hits(logits, truth)
            total[3] += cross_entropy(logits, truth, reduction="sum")
    return total


def figures(total: Tensor) -> dict[str, float]:
    """What `sums` come to per image. Raises BadInput if there was none that could be read."""
    count, top1, top5, loss = total.tolist()
    if not count:
        raise BadInput("no image to evaluate on that can be read", expected="JPEG or PNG files in the val split",
                       mend="Check the data folder.")
    return {"top1_accuracy": top1 / count, "top5_accuracy": top5 / count, "val_loss": loss / count}


def hits(scores: Tensor, labels: Tensor) -> Tensor:
    """How often the class scored highest is the true one, and how often it is among the first five: int64 [2].

    `scores` [B, C]; with fewer than five classes the second is B.
    """
    first = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack([first[:, 0].sum(), first.sum()])


def _check_known(labels: Tensor, classes: int) -> None:
    if len(labels) and int(labels.max()) >= classes:
        raise BadInput(f"images of {int(labels.max()) + 1} classes to evaluate on", expected=f"at most {classes}, "
                       "the width of the classifier", mend="Evaluate on the classes that it was trained on.")
