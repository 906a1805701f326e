import logging

import pytest
import torch
from torch import Tensor, nn

from training.errors import BadInput
from training.models.config import Amp
from training.precision import GROWTH_INTERVAL, Precision

CPU = torch.device("cpu")
PRETENDED = torch.device("meta")  # fp16 is refused on a CPU only; the arithmetic of scaling is the same anywhere


def halves(parameters: list[nn.Parameter]) -> Precision:
    return Precision(Amp(use_amp=True, dtype="fp16"), PRETENDED, parameters)


def weight() -> nn.Parameter:
    return nn.Parameter(torch.tensor([2.0]))


def through_float16(parameter: Tensor, factor: float) -> Tensor:
    """factor * parameter, with its gradient passing through float16, as it does in an autocast region."""
    return (parameter.half() * torch.tensor(1.0, dtype=torch.float16)).float().sum() * factor


@pytest.mark.parametrize(("amp", "dtype"), [
    (Amp(), torch.float32), (Amp(dtype="fp16"), torch.float32), (Amp(use_amp=True), torch.bfloat16)])
def test_matrix_products_are_computed_in_what_amp_says(amp: Amp, dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 3)
    precision = Precision(amp, CPU, layer.parameters())
    with precision.autocast():
        output = layer(torch.ones(2, 4))
    assert output.dtype == dtype
    assert precision.backward(output.float().sum())
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


def test_without_amp_an_outer_autocast_does_not_reach_in() -> None:
    with torch.autocast("cpu", torch.bfloat16), Precision(Amp(), CPU, []).autocast():
        assert nn.Linear(4, 3)(torch.ones(2, 4)).dtype == torch.float32


def test_float16_on_a_cpu_is_refused_before_training() -> None:
    with pytest.raises(BadInput, match=r"model\.amp\.dtype = 'fp16' on a CPU; expected bf16"):
        Precision(Amp(use_amp=True, dtype="fp16"), CPU, [])


def test_gradients_that_float16_would_lose_survive_by_scaling() -> None:
    unscaled, scaled = weight(), weight()
    through_float16(unscaled, 1e-8).backward()
    assert unscaled.grad is not None
    assert unscaled.grad.item() == 0
    assert halves([scaled]).backward(through_float16(scaled, 1e-8))
    assert scaled.grad is not None
    assert scaled.grad.item() == pytest.approx(1e-8, rel=1e-3)


def test_overflow_drops_the_gradients_and_halves_the_scale(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    parameter, other = weight(), weight()
    precision = halves([parameter, other])
    before = precision.state()["loss_scale"]
    assert not precision.backward(through_float16(parameter, 2.0) + other.sum())
    assert (parameter.grad, other.grad) == (None, None)
    assert precision.state() == {"loss_scale": before / 2, "good_steps": 0}
    assert "dropped" in caplog.text


def test_scale_falls_until_the_gradients_fit() -> None:
    parameter = weight()
    precision = halves([parameter])
    outcomes = []
    while not outcomes or not outcomes[-1]:
        outcomes.append(precision.backward(through_float16(parameter, 100.0)))
    assert outcomes == [False] * 7 + [True]  # 100 * 2**9 is below 65504, 100 * 2**10 beyond
    assert parameter.grad is not None
    assert parameter.grad.item() == 100


def test_good_micro_batches_double_the_scale() -> None:
    parameter = weight()
    precision = halves([parameter])
    scales = []
    for _ in range(2 * GROWTH_INTERVAL + 1):
        parameter.grad = None
        precision.backward(through_float16(parameter, 1e-4))
        scales.append(precision.state()["loss_scale"])
    first = scales[0]
    assert [scales.count(first * 2**doublings) for doublings in range(3)] == [GROWTH_INTERVAL - 1, GROWTH_INTERVAL, 2]


def test_an_overflow_starts_the_count_of_good_micro_batches_anew() -> None:
    parameter = weight()
    precision = halves([parameter])
    precision.load({"loss_scale": 1024.0, "good_steps": GROWTH_INTERVAL - 1})
    assert not precision.backward(through_float16(parameter, 1000.0))
    assert precision.backward(through_float16(parameter, 1.0))
    assert precision.state() == {"loss_scale": 512.0, "good_steps": 1}


def test_state_goes_on_where_it_stopped() -> None:
    first, second = weight(), weight()
    old, new = halves([first]), halves([second])
    old.backward(through_float16(first, 2.0))
    old.backward(through_float16(first, 1e-3))
    new.load(old.state())
    assert new.state() == old.state() == {"loss_scale": 2.0**15, "good_steps": 1}


def test_gradients_that_overflow_at_every_scale_end_training() -> None:
    parameter = weight()
    precision = halves([parameter])
    precision.load({"loss_scale": 2**-9, "good_steps": 0})
    assert not precision.backward(through_float16(parameter, float("inf")))
    with pytest.raises(ArithmeticError, match="at every loss scale"):
        precision.backward(through_float16(parameter, float("inf")))


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_the_recipes_choice(tf32: bool) -> None:
    Precision(Amp(tf32=tf32), torch.device("cpu"), [])
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (tf32, tf32)
