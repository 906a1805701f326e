"""Three processes, over gloo, against loops in one. Run as a script, this is one of the three."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from averaging.distributed_optimizer import get_distributed_optimizer
from averaging.strategies.local_sgd_schedule import turn

PROCESSES, STEPS = 3, 13
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
Optimizer = torch.optim.Optimizer


def sgd(groups: Any) -> Optimizer:
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01)


def adam(groups: Any) -> Optimizer:
    return torch.optim.AdamW(groups, lr=0.03)


@dataclass(frozen=True)
class Case:
    """One run of all processes, or of two; `average_after` and `lone_steps` say by hand what the schedule is."""

    arg_dict: dict[str, Any]
    average_after: tuple[int, ...]
    lone_steps: int = 0  # made by the first process only, which then hands its model on
    optimizer: Callable[[Any], Optimizer] = sgd
    ranks: tuple[int, ...] = (0, 1, 2)
    overflows: tuple[int, int] | None = None  # (rank, step) of a gradient that GradScaler finds infinite
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float32)
    exempt: int = 0  # parameters in a group with allow_data_parallelism=False, the last ones
    closure: bool = False
    rate_halves_every: int = 0
    tolerance: dict[str, float] = field(default_factory=lambda: CLOSE)


CASES = {
    "as_by_default": Case({}, (3, 7, 11)),
    "averaging_every_step": Case({"local_steps": 1}, tuple(range(STEPS))),
    "many_processes_first": Case({"local_steps": 3, "initial_steps": 5, "initial_step_method": "multiple_processes"},
                                 (0, 1, 2, 3, 4, 7, 10)),
    "one_process_first": Case({"local_steps": 4, "initial_steps": 5, "init_step_method": "single_process"}, (8, 12),
                              lone_steps=5, optimizer=adam),
    "pair": Case({"local_steps": 2}, (1, 3, 5, 7, 9, 11), ranks=(0, 2), tolerance={"rtol": 0, "atol": 0}),
    "single": Case({"local_steps": 2}, (1, 3), ranks=(1,), tolerance={"rtol": 0, "atol": 0}),
    "exempt": Case({"local_steps": 2, "initial_steps": 3}, (4, 6, 8, 10, 12), lone_steps=3, exempt=1),
    "closure_and_schedule": Case({"local_steps": 5}, (4, 9), closure=True, rate_halves_every=3),
    "mixed_dtypes": Case({"local_steps": 4}, (3, 7, 11), dtypes=(torch.float64, torch.bfloat16, torch.float32),
                         tolerance={"rtol": 1e-2, "atol": 1e-2}),
    "overflow": Case({"local_steps": 4}, (3, 7, 11), overflows=(1, 5)),
    "overflow_at_the_average": Case({"local_steps": 4}, (3, 7, 11), overflows=(2, 7)),
}


def start(case: Case, rank: int) -> list[Tensor]:
    """Other weights in every process."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(3, index + 2, generator=generator).to(dtype).requires_grad_()
            for index, dtype in enumerate(case.dtypes)]


def grouped(case: Case, params: list[Tensor]) -> list[dict[str, Any]]:
    shared = len(params) - case.exempt
    return [{"params": params[:shared]},
            *([{"params": params[shared:], "allow_data_parallelism": False}] if case.exempt else [])]


def loss_of(params: list[Tensor], rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.stack([(param - torch.randn(param.shape, generator=generator).to(param.dtype)).pow(2).sum()
                        .to(torch.float64) for param in params]).sum()


def flat(params: list[Tensor]) -> Tensor:
    return torch.cat([param.detach().to(torch.float64).flatten() for param in params])


def simulate(case: Case) -> dict[int, Tensor]:
    """Rank to its weights after every step [STEPS, N]: plain loops over all processes."""
    first = case.ranks[0]
    models = {rank: start(case, rank) for rank in case.ranks}
    shared = len(models[first]) - case.exempt

    def share(values: Callable[[int], Tensor]) -> None:
        with torch.no_grad():
            for index in range(shared):
                value = values(index)
                for rank in case.ranks:
                    models[rank][index].copy_(value)

    share(lambda index: models[first][index].clone())
    optimizers = {rank: case.optimizer(grouped(case, models[rank])) for rank in case.ranks}
    history: dict[int, list[Tensor]] = {rank: [] for rank in case.ranks}
    for step in range(STEPS):
        for rank in case.ranks:
            if case.rate_halves_every:
                for group in optimizers[rank].param_groups:
                    group["lr"] = 0.1 * 0.5 ** (step // case.rate_halves_every)
            optimizers[rank].zero_grad()
            loss_of(models[rank], rank, step).backward()
            if (step >= case.lone_steps or rank == first) and case.overflows != (rank, step):
                optimizers[rank].step()
        if step in case.average_after:
            share(lambda index: torch.stack([models[rank][index].double() for rank in case.ranks]).mean(0))
        if case.lone_steps and step == case.lone_steps - 1:
            share(lambda index: models[first][index].clone())
        for rank in case.ranks:
            history[rank].append(flat(models[rank]))
    return {rank: torch.stack(rows) for rank, rows in history.items()}


def drive(case: Case, rank: int, optimizer: Optimizer, params: list[Tensor], steps: range) -> list[Tensor]:
    """As any training script would; the weights after every step."""
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, case.rate_halves_every or STEPS + 1, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=case.overflows is not None)
    history = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(params, rank, step)
        scaler.scale(loss).backward()
        if case.overflows == (rank, step):
            assert params[0].grad is not None
            params[0].grad[0, 0] = torch.inf
        if case.closure:
            assert optimizer.step(lambda loss=loss: float(loss)) == float(loss)
        else:
            scaler.step(optimizer)
        scaler.update()
        schedule.step()
        history.append(flat(params))
    return history


def run(rank: int) -> dict[str, Tensor]:
    """All that is compared, as process `rank` computes it."""
    found = {}
    for name, case in CASES.items():
        if rank in case.ranks:
            params = start(case, rank)
            optimizer = get_distributed_optimizer("local_sgd", case.optimizer(grouped(case, params)), rank,
                                                  len(case.ranks), list(case.ranks), case.arg_dict)
            found[name] = torch.stack(drive(case, rank, optimizer, params, range(STEPS)))
    found |= {f"resumed_at_{cut}_{name}": resume(CASES[name], rank, cut)
              for name in ("as_by_default", "one_process_first") for cut in (2, 6)}
    found |= grown(rank)
    return found


def resume(case: Case, rank: int, cut: int) -> Tensor:
    """The same run in two parts, the second from what the first wrote to a file."""
    params = start(case, rank)
    optimizer = get_distributed_optimizer("local_sgd", case.optimizer(params), rank, PROCESSES, [2, 0, 1],
                                          case.arg_dict)
    history = drive(case, rank, optimizer, params, range(cut))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": params}, file)
    file.seek(0)
    saved = torch.load(file)

    params = start(case, rank + 7)
    optimizer = get_distributed_optimizer("local_sgd", case.optimizer(params), rank, PROCESSES, [0, 1, 2],
                                          case.arg_dict)
    with torch.no_grad():
        torch._foreach_copy_(params, saved["params"])
    optimizer.load_state_dict(saved["optimizer"])
    return torch.stack(history + drive(case, rank, optimizer, params, range(cut, STEPS)))


def grown(rank: int) -> dict[str, Tensor]:
    """A group that comes later is given the first process' weights, and averaged with the rest."""
    old, new = start(CASES["as_by_default"], rank)
    optimizer = get_distributed_optimizer("local_sgd", sgd([old]), rank, PROCESSES, range(PROCESSES),
                                          {"local_steps": 1})
    optimizer.add_param_group({"params": [new], "lr": 0.05})
    joined = new.detach().clone()
    optimizer.zero_grad()
    loss_of([old, new], rank, 0).backward()
    optimizer.step()
    return {"grown.joined": joined, "grown.averaged": new.detach()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What each of the processes finds."""
    folder = tmp_path_factory.mktemp("three")
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=environment)
                 for rank in range(PROCESSES)]
    try:
        assert [process.wait(120) for process in processes] == [0] * PROCESSES
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [load_file(folder / f"{rank}.safetensors") for rank in range(PROCESSES)]


@pytest.mark.parametrize("name", CASES)
def test_processes_do_what_loops_in_one_process_do(results: list[dict[str, Tensor]], name: str) -> None:
    for rank, expected in simulate(CASES[name]).items():
        torch.testing.assert_close(results[rank][name], expected, **CASES[name].tolerance)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if len(case.ranks) > 1 and not case.exempt])
def test_models_are_equal_to_the_bit_after_an_average_and_differ_before(results: list[dict[str, Tensor]],
                                                                        name: str) -> None:
    case = CASES[name]
    one, other = (results[rank][name] for rank in (case.ranks[0], case.ranks[-1]))
    assert all(torch.equal(one[step], other[step]) for step in case.average_after)
    assert not any(torch.equal(one[step], other[step]) for step in range(case.lone_steps, STEPS)
                   if step not in case.average_after)


def test_a_group_without_data_parallelism_stays_each_process_own(results: list[dict[str, Tensor]]) -> None:
    own = [found["exempt"][:, -9:] for found in results]
    assert not any(torch.equal(own[0][step], other[step]) for other in own[1:] for step in range(STEPS))


@pytest.mark.parametrize("cut", [2, 6])
@pytest.mark.parametrize("name", ["as_by_default", "one_process_first"])
def test_a_resumed_run_goes_on_exactly(results: list[dict[str, Tensor]], name: str, cut: int) -> None:
    """In the midst of a round of local steps, or of the initial ones."""
    for found in results:
        assert torch.equal(found[f"resumed_at_{cut}_{name}"], found[name])


def test_a_group_that_is_added_is_the_first_process_own_and_then_averaged(results: list[dict[str, Tensor]]) -> None:
    _, weights = start(CASES["as_by_default"], 0)
    targets = [weights.detach() - weight_gradient(weights, rank) for rank in range(PROCESSES)]
    mean = torch.stack([weights.detach() - 0.05 * (2 * (weights.detach() - target) + 0.01 * weights.detach())
                        for target in targets]).mean(0)
    for found in results:
        assert torch.equal(found["grown.joined"], weights)
        torch.testing.assert_close(found["grown.averaged"], mean, **CLOSE)


def weight_gradient(weights: Tensor, rank: int) -> Tensor:
    """Half the gradient of the second parameter at step 0."""
    old = start(CASES["as_by_default"], 0)[0]
    [gradient] = torch.autograd.grad(loss_of([old, weights], rank, 0), [weights])
    return gradient / 2


def single(arg_dict: Any = None, **changes: Any) -> Optimizer:
    params = [torch.ones(2, requires_grad=True)]
    arguments = {"alg": "local_sgd", "local_optimizer": sgd(params), "rank": 0, "world_size": 1, "group": [0],
                 "arg_dict": {} if arg_dict is None else arg_dict} | changes
    return get_distributed_optimizer(**arguments)


@pytest.mark.parametrize(("changes", "message"), [
    ({"alg": "local_sdg"}, "alg = 'local_sdg'; expected 'local_sgd'. Did you mean 'local_sgd'?"),
    ({"alg": None}, "alg = None; expected 'local_sgd'."),
    ({"local_optimizer": [torch.ones(1)]}, "expected a torch.optim.Optimizer"),
    ({"arg_dict": {"local_step": 3}}, "unknown key 'local_step' in arg_dict.*Did you mean 'local_steps'?"),
    ({"arg_dict": {"momentum": 0.9}}, "unknown key 'momentum' in arg_dict; expected 'local_steps' or 'initial_steps'"),
    ({"arg_dict": [("local_steps", 3)]}, "expected a dictionary"),
    ({"arg_dict": {"local_steps": 0}}, "local_steps = 0; expected a whole number, 1 or more"),
    ({"arg_dict": {"local_steps": 2.0}}, "local_steps = 2.0; expected a whole number"),
    ({"arg_dict": {"local_steps": "4"}}, "local_steps = '4'; expected a whole number"),
    ({"arg_dict": {"local_steps": True}}, "local_steps = True; expected a whole number"),
    ({"arg_dict": {"initial_steps": -1}}, "initial_steps = -1; expected a whole number, 0 or more"),
    ({"arg_dict": {"initial_step_method": "single"}}, "initial_step_method = 'single'.*Did you mean 'single_process'?"),
    ({"arg_dict": {"init_step_method": None}}, "initial_step_method = None"),
    ({"arg_dict": {"init_step_method": "single_process", "initial_step_method": "multiple_processes"}},
     "initial_step_method = 'multiple_processes'; expected 'single_process'"),
    ({"world_size": 2}, "world_size = 2; expected 1, the number of ranks in group"),
    ({"rank": 1}, "rank = 1; expected one of the ranks in group"),
    ({"group": [0, 0], "world_size": 2}, "expected every rank once"),
    ({"group": None}, "group = None; expected the ranks"),
    ({"group": [0, 1], "world_size": 2}, "init_process_group"),
])
def test_what_is_wrong_is_an_error_when_it_is_configured(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?").replace(".*", "(.|\n)*")):
        single(**changes)


def test_both_spellings_may_be_given_where_they_agree() -> None:
    single({"init_step_method": "multiple_processes", "initial_step_method": "multiple_processes"})


def test_a_plain_optimisers_state_is_refused_and_its_own_is_taken() -> None:
    optimizer = single()
    with pytest.raises(ValueError, match="a state dict with state, param_groups; expected one with local_sgd"):
        optimizer.load_state_dict(sgd([torch.ones(2, requires_grad=True)]).state_dict())
    optimizer.load_state_dict(optimizer.state_dict())


def test_it_is_a_torch_optimiser_for_hooks_and_schedules() -> None:
    optimizer, calls = single(), list[str]()
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=10)  # looks into defaults and groups
    optimizer.step()
    assert calls == ["before", "after"]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 / 25)
    assert isinstance(optimizer, Optimizer)


def test_after_loading_a_state_a_schedule_still_reaches_what_steps() -> None:
    """`load_state_dict` replaces torch's groups: a wrapper that held on to the old ones would show another rate."""
    optimizer = single()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.0
    [weights] = optimizer.param_groups[0]["params"]
    weights.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(weights, torch.ones(2))


@pytest.mark.parametrize("initial_steps", [0, 1, 3])
@pytest.mark.parametrize("local_steps", [1, 4])
def test_the_schedule_is_a_closed_form(initial_steps: int, local_steps: int) -> None:
    steps = range(initial_steps + 3 * local_steps)
    many, one = ([turn(step, local_steps=local_steps, initial_steps=initial_steps, initial_step_method=method)
                  for step in steps] for method in ("multiple_processes", "single_process"))
    rounds = [initial_steps + local_steps * number - 1 for number in (1, 2, 3)]
    assert [step for step in steps if many[step].then == "average"] == [*range(initial_steps), *rounds]
    assert [step for step in steps if one[step].then == "average"] == rounds
    assert [step for step in steps if one[step].then == "copy"] == [*range(initial_steps)][-1:]
    assert [step for step in steps if one[step].alone] == [*range(initial_steps)]
    assert not any(now.alone or now.then == "copy" for now in many)


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), PROCESSES)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=60))
    save_file({name: tensor.contiguous() for name, tensor in run(rank).items()}, folder / f"{rank}.safetensors")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
