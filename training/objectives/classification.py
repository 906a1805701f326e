"""Supervised classification: cross-entropy of a linear classifier on the trunk's features."""

from pathlib import Path

from torch import Tensor, distributed, nn
from torch.nn import functional

from training.errors import BadInput
from training.models.trunk import build_trunk
from training.objectives.objective import Objective, full_precision
from training.recipe import ClassificationTraining, Training


def build(training: Training, *, batch_size: int | None, group: distributed.ProcessGroup | None,
          output_dir: Path | None) -> "Classification":
    """As `build_objective` says; a batch needs no company here, and there is nothing to dump."""
    assert isinstance(training, ClassificationTraining)
    return Classification(training)


class Classification(Objective):
    """Trunk and classifier. Its metric is `train_top1_accuracy`, over the batch as augmented."""

    def __init__(self, training: ClassificationTraining) -> None:
        super().__init__()
        classes, trunk = training.data.num_classes, build_trunk(training.model.trunk)
        assert classes is not None
        self.backbone, self.classifier = trunk, nn.Linear(trunk.feature_width, classes)
        self._label_smoothing = training.loss.label_smoothing

    def forward(self, views: list[Tensor], labels: Tensor | None, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        if labels is None:
            raise BadInput("images without classes", expected="one folder per class", mend="Sort the images into such.")
        logits = self.predict(views[0])
        with full_precision(logits.device):
            loss = functional.cross_entropy(logits, labels, label_smoothing=self._label_smoothing)
        return loss, {"train_top1_accuracy": (logits.detach().argmax(1) == labels).float().mean()}

    def predict(self, images: Tensor) -> Tensor:
        """Images float [B, 3, H, W] -> logits float32 [B, num_classes]."""
        logits: Tensor = self.classifier(self.backbone(images))
        return logits.float()
