"""The linear probe: multinomial logistic regression on frozen features, full batch, without randomness."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, nll_loss

from training.data.sources import Source
from training.data.transforms_config import Transforms
from training.evaluation.classifier import hits
from training.evaluation.features import IMAGENET, Labelled, Splits, backbone_features, device_of, pixel_features
from training.evaluation_config import Evaluation
from training.evaluation_config import LinearProbe as Config

logger = logging.getLogger(__name__)

ROWS = 16384  # of the features at once, so that ImageNet's [1.28e6, 1000] scores never are; 64 MiB for 1000 classes
RESIDENT_BYTES = 1 << 30  # features up to 1 GiB move to the device once, larger ones part by part in every iteration
GRADIENT = 1e-5  # largest entry at which the minimum counts as reached
CPU = torch.device("cpu")


def linear_probe(backbone: nn.Module, train: Source, val: Source, config: Evaluation,
                 transforms: Transforms = IMAGENET) -> dict[str, float]:
    """{"linear_probe_accuracy", "linear_probe_top5_accuracy"} in [0, 1] on val of a probe fitted to train's features.

    `backbone` is run as by `evaluate_backbone`: one centre crop of each image, no augmentation.
    """
    return probe_figures(backbone_features(backbone, train, val, config, transforms), config, device_of(backbone))


def probe_pixels(train: Source, val: Source, config: Evaluation) -> dict[str, float]:
    """The same figures with the pixels themselves as features."""
    return probe_figures(pixel_features(train, val, config), config)


def probe_figures(splits: Splits, config: Evaluation, device: torch.device = CPU) -> dict[str, float]:
    """`linear_probe`'s figures of features that are there already, with the work done on `device`."""
    train, (features, labels) = splits
    probe = fit(*train, config.linear_probe, device)
    found = [hits(probe.scores(x), y) for x, y in _parts(features, labels, device)]
    top1, top5 = torch.stack(found).sum(0).tolist()
    return {"linear_probe_accuracy": top1 / len(labels), "linear_probe_top5_accuracy": top5 / len(labels)}


@dataclass(frozen=True)
class Probe:
    """A linear classifier of C classes on standardised features of width F."""

    weight: Tensor     # float32 [C, F]
    bias: Tensor       # float32 [C]
    mean: Tensor       # float32 [F], of the features it was fitted to
    deviation: Tensor  # float32 [F], likewise

    def scores(self, features: Tensor) -> Tensor:
        """Features [B, F] as they come -> log-probabilities up to a constant, [B, C]."""
        return self.standardised(features) @ self.weight.T + self.bias

    def standardised(self, features: Tensor) -> Tensor:
        """Mean 0 and deviation 1 on what it was fitted to, so that L-BFGS meets no long valleys."""
        return (features - self.mean).div_(self.deviation)


@torch.no_grad()
def fit(features: Tensor, labels: Tensor, config: Config, device: torch.device = CPU) -> Probe:
    """The minimum of mean cross-entropy + weight_decay / 2 * |weight|^2 over features [N, F], found by L-BFGS.

    Begins at zero, so that equal features give an equal probe. Says in the log if max_iterations ended it.
    """
    if features.nbytes <= RESIDENT_BYTES:
        features, labels = features.to(device), labels.to(device)
    deviation, mean = (moment.to(device) for moment in torch.std_mean(features, dim=0, correction=0))
    deviation = torch.where(deviation > 1e-5 * mean.abs(), deviation, 1)  # below is the rounding of a constant
    classes = int(labels.max()) + 1
    probe = Probe(torch.zeros(classes, features.shape[1], device=device), torch.zeros(classes, device=device),
                  mean, deviation)
    minimiser = torch.optim.LBFGS([probe.weight, probe.bias], max_iter=config.max_iterations,
                                  max_eval=30 * config.max_iterations, tolerance_grad=GRADIENT, history_size=20,
                                  line_search_fn="strong_wolfe")

    def closure() -> float:
        loss, probe.weight.grad, probe.bias.grad = loss_and_gradient(probe, features, labels, config.weight_decay)
        return loss

    minimiser.step(closure)  # type: ignore[no-untyped-call]
    if minimiser.state[probe.weight]["n_iter"] >= config.max_iterations:
        logger.warning("the linear probe was still improving after evaluation.linear_probe.max_iterations = %d",
                       config.max_iterations)
    return probe


@torch.no_grad()
def loss_and_gradient(probe: Probe, features: Tensor, labels: Tensor,
                      weight_decay: float) -> tuple[float, Tensor, Tensor]:
    """The penalised loss, and its gradient by weight [C, F] and by bias [C], in closed form and part by part."""
    loss = torch.zeros((), dtype=torch.float64, device=probe.weight.device)
    by_weight, by_bias = torch.zeros_like(probe.weight), torch.zeros_like(probe.bias)
    for raw, truth in _parts(features, labels, probe.weight.device):
        x = probe.standardised(raw)
        log_likelihood = log_softmax(x @ probe.weight.T + probe.bias, dim=1)
        loss += nll_loss(log_likelihood, truth, reduction="sum")
        excess = log_likelihood.exp_()
        excess[torch.arange(len(truth), device=excess.device), truth] -= 1
        by_weight.addmm_(excess.T, x)
        by_bias += excess.sum(0)
    count, penalty = len(labels), weight_decay / 2 * probe.weight.double().square().sum()
    return (loss / count + penalty).item(), by_weight / count + weight_decay * probe.weight, by_bias / count


def _parts(features: Tensor, labels: Tensor, device: torch.device) -> Iterator[Labelled]:
    for x, y in zip(torch.split(features, ROWS), torch.split(labels, ROWS), strict=True):
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)
