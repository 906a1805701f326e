from copy import deepcopy

import pytest
import torch
from decent_dp import optim as decent_dp
from torch import Tensor

from training.optimizers.accum_adam import AccumAdam

RATES = [1e-3, 3e-3, 2e-2, 1e-2]


def some_parameters(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(4, 3), (5,), (), (2, 3, 2)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def give_gradients(params: list[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def advance(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = RATES[step % len(RATES)]
        give_gradients(params, seed=step)
        optimizer.step()


def flat(params: list[Tensor]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in params])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-7)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("every", [1, 3, 8])
@pytest.mark.parametrize("decoupled", [False, True])
def test_it_is_the_published_packages_rule(decoupled: bool, every: int, decay: float, dtype: torch.dtype,
                                           tolerance: float) -> None:
    ours, theirs = some_parameters(dtype), some_parameters(dtype)
    options = {"lr": 1.0, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": decay, "accum_iter": every}
    published = decent_dp.AccumAdamW if decoupled else decent_dp.AccumAdam
    pair = [(AccumAdam(ours, decoupled=decoupled, **options), ours), (published(theirs, **options), theirs)]
    for step in range(3 * every + 2):
        for optimizer, params in pair:
            advance(optimizer, params, range(step, step + 1))
        torch.testing.assert_close(flat(ours), flat(theirs), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("decoupled", "twin"), [(False, torch.optim.Adam), (True, torch.optim.AdamW)])
def test_with_one_step_at_a_time_it_is_adam(decoupled: bool, twin: type[torch.optim.Optimizer]) -> None:
    ours, theirs = some_parameters(), some_parameters()
    advance(AccumAdam(ours, weight_decay=0.1, accum_iter=1, decoupled=decoupled), ours, range(9))
    advance(twin(theirs, weight_decay=0.1), theirs, range(9))
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-12, atol=1e-12)


def test_a_constant_gradient_moves_every_weight_by_the_rate_at_every_step() -> None:
    """Then m' / (1 - b1^e) is the gradient and v' / (1 - b2^e) its square, whatever K: a closed form."""
    weight = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    optimizer = AccumAdam([weight], lr=0.01, eps=0.0, accum_iter=4)
    for _ in range(11):
        weight.grad = torch.tensor([0.5, -70.0], dtype=torch.float64)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([1 - 0.11, -2 + 0.11], dtype=torch.float64))


def test_a_parameter_that_was_frozen_for_a_while_counts_its_own_steps() -> None:
    together, alone = some_parameters(), some_parameters()
    optimizer = AccumAdam(together, accum_iter=3)
    for step in range(4):
        give_gradients(together, seed=step)
        together[1].grad = None
        optimizer.step()
    advance(optimizer, together, range(4, 12))
    late = AccumAdam(alone, accum_iter=3)
    advance(late, alone, range(4, 12))
    assert torch.equal(together[1], alone[1])
    assert not torch.equal(together[0], alone[0])
    assert [int(optimizer.state[p]["step"]) for p in together] == [12, 8, 12, 12]


def test_gradients_are_left_as_they_were() -> None:
    params = some_parameters()
    give_gradients(params, seed=0)
    before = [p.grad.clone() for p in params]
    AccumAdam(params, weight_decay=0.5).step()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(params, before, strict=True))


def test_it_goes_on_from_its_state_in_the_middle_of_a_round_of_accumulation() -> None:
    """Bit for bit, and all of the state is in tensors: what checkpoints and other peers get."""
    straight, resumed = some_parameters(torch.float32), some_parameters(torch.float32)
    advance(AccumAdam(straight, accum_iter=4), straight, range(11))
    first = AccumAdam(resumed, accum_iter=4)
    advance(first, resumed, range(6))
    second = AccumAdam(resumed, accum_iter=4)
    second.load_state_dict(deepcopy(first.state_dict()))
    advance(second, resumed, range(6, 11))
    assert torch.equal(flat(straight), flat(resumed))
    for state in second.state.values():
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq", "accum_grad"}
        assert all(isinstance(value, Tensor) for value in state.values())
