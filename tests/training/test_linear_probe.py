"""The linear probe against scikit-learn's logistic regression, autograd and its invariances."""

import logging

import numpy as np
import pytest
import torch
from pictures import bright_or_dark, noise
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from training.evaluation import linear_probe, probe, probe_pixels
from training.evaluation.probe import Probe, fit, loss_and_gradient, probe_figures
from training.evaluation_config import Evaluation, LinearProbe

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
Labelled = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def digits() -> tuple[Labelled, Labelled]:
    """scikit-learn's digits as they are, 64 pixels each; every fifth held out."""
    bunch = load_digits()
    pixels, labels = torch.tensor(bunch.data, dtype=torch.float32), torch.tensor(bunch.target)
    held_out = torch.arange(len(labels)) % 5 == 0
    return (pixels[~held_out], labels[~held_out]), (pixels[held_out], labels[held_out])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight_decay", [1e-1, 1e-3, 1e-5])
def test_agrees_with_scikit_learn(digits: tuple[Labelled, Labelled], weight_decay: float, device: str) -> None:
    (pixels, labels), (val_pixels, val_labels) = digits
    scaler = StandardScaler().fit(pixels.double().numpy())
    inputs = [scaler.transform(each.double().numpy()) for each in (pixels, val_pixels)]
    reference = LogisticRegression(C=1 / (len(labels) * weight_decay), tol=1e-8, max_iter=5000).fit(inputs[0], labels)
    likelihood = np.log(reference.predict_proba(inputs[0]))[np.arange(len(labels)), labels]
    reference_loss = -likelihood.mean() + weight_decay / 2 * (reference.coef_**2).sum()

    config = Evaluation(linear_probe=LinearProbe(weight_decay=weight_decay))
    where = torch.device(device)
    loss, _, _ = loss_and_gradient(fit(pixels, labels, config.linear_probe, where), pixels, labels, weight_decay)
    assert loss == pytest.approx(reference_loss, rel=1e-2, abs=1e-6)
    assert loss > reference_loss - 1e-6
    accuracy = probe_figures(digits, config, where)["linear_probe_accuracy"]
    assert accuracy == pytest.approx(reference.score(inputs[1], val_labels), abs=0.005)


@pytest.fixture
def task() -> tuple[Labelled, Labelled]:
    """Eight classes that a line separates only in part, features [., 12]."""
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(400, 12, generator=generator), torch.arange(400) % 8
    features[torch.arange(400), labels] += 1.5
    return (features[:300], labels[:300]), (features[300:], labels[300:])


def scores_of(train: Labelled, val: Tensor) -> Tensor:
    return fit(*train, LinearProbe()).scores(val)


def test_gradient_is_that_of_autograd(task: tuple[Labelled, Labelled]) -> None:
    (features, labels), _ = task
    weight, bias = torch.randn(8, 12, requires_grad=True), torch.randn(8, requires_grad=True)
    probed = Probe(weight, bias, features.mean(0), features.std(0))
    expected = cross_entropy(probed.scores(features), labels) + 0.05 * weight.square().sum()
    by_weight, by_bias = torch.autograd.grad(expected, [weight, bias])
    loss, *gradient = loss_and_gradient(probed, features, labels, weight_decay=0.1)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, [by_weight, by_bias], rtol=1e-4, atol=1e-6)


def test_parts_make_no_difference(task: tuple[Labelled, Labelled], monkeypatch: pytest.MonkeyPatch) -> None:
    train, (val, _) = task
    whole = scores_of(train, val)
    monkeypatch.setattr(probe, "ROWS", 70)
    torch.testing.assert_close(scores_of(train, val), whole, rtol=1e-2, atol=1e-2)


def test_unit_origin_and_constants_of_features_make_no_difference(task: tuple[Labelled, Labelled]) -> None:
    train, (val, _) = task
    units, origin = torch.logspace(-3, 3, 12), torch.linspace(-1, 1, 12)

    def changed(features: Tensor) -> Tensor:
        return torch.cat([(features + origin) * units, torch.full((len(features), 1), 0.7)], dim=1)

    torch.testing.assert_close(scores_of((changed(train[0]), train[1]), changed(val)), scores_of(train, val),
                               rtol=1e-2, atol=1e-2)


def test_equal_features_give_an_equal_probe(task: tuple[Labelled, Labelled]) -> None:
    train, (val, _) = task
    assert torch.equal(scores_of(train, val), scores_of(train, val))


def test_weight_decay_shrinks_weights_but_not_the_bias(task: tuple[Labelled, Labelled]) -> None:
    (features, labels), _ = task
    labels = torch.where(torch.arange(len(labels)) % 3 == 0, 0, labels)  # class 0 is frequent
    probed = fit(features, labels, LinearProbe(weight_decay=10))
    assert probed.weight.abs().max() < 0.05
    torch.testing.assert_close(probed.bias.softmax(0), labels.bincount() / len(labels), rtol=0, atol=5e-3)


def test_an_early_end_is_told(task: tuple[Labelled, Labelled], caplog: pytest.LogCaptureFixture) -> None:
    train, _ = task
    with caplog.at_level(logging.WARNING):
        fit(*train, LinearProbe())
        assert not caplog.messages
        fit(*train, LinearProbe(max_iterations=3))
    assert caplog.messages == ["the linear probe was still improving after evaluation.linear_probe.max_iterations = 3"]


def test_top5_counts_what_top1_nearly_found(task: tuple[Labelled, Labelled]) -> None:
    figures = probe_figures(task, Evaluation())
    assert 0.3 < figures["linear_probe_accuracy"] < figures["linear_probe_top5_accuracy"] < 1


def test_a_backbone_and_pixels_are_probed_on_sources() -> None:
    perfect = {"linear_probe_accuracy": 1.0, "linear_probe_top5_accuracy": 1.0}
    assert linear_probe(nn.Flatten(), bright_or_dark(20), bright_or_dark(10), Evaluation(batch_size=8)) == perfect
    assert probe_pixels(bright_or_dark(20), bright_or_dark(10), Evaluation()) == perfect
    assert probe_pixels(noise(60, 10), noise(50, 10, seed=1), Evaluation())["linear_probe_accuracy"] < 0.5
