"""Local SGD as a drop-in torch optimiser, for a fixed world of processes (references/local_sgd.md)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, distributed

from averaging.strategies.local_sgd_schedule import InitialStepMethod, turn
from training.config import nearest

ALGORITHMS = ("local_sgd",)
DEFAULTS: dict[str, Any] = {"local_steps": 4, "initial_steps": 0, "initial_step_method": "single_process"}
ALIASES = {"init_step_method": "initial_step_method"}  # the reference document has both spellings


def get_distributed_optimizer(  # noqa: PLR0917  # the reference document's signature
        alg: str, local_optimizer: torch.optim.Optimizer, rank: int, world_size: int, group: Sequence[int],
        arg_dict: Mapping[str, Any]) -> torch.optim.Optimizer:
    """A torch optimiser that steps with `local_optimizer` and, in between, shares parameters with other processes.

    alg: "local_sgd", (post-)local SGD (Lin et al., arXiv 1808.07217), the only one so far.
    rank: of this process in torch.distributed, which must have been initialised where `group` has other processes.
    world_size: number of processes in `group`. group: their ranks, the same on each of them.
    arg_dict: any of
        initial_steps (int, default 0): steps before local SGD begins;
        initial_step_method (or init_step_method): "multiple_processes", all step, and average after each initial
            step; "single_process" (default), the lowest rank steps, and after the last one the others copy its model;
        local_steps (int, default 4): steps between two averagings after that.

    All processes of the group must call this, `step` and `add_param_group` equally often. The parameters are those of
    the lowest rank from here on: load a checkpoint's weights after this call. Gradients are used as they are, and
    statistics of the optimiser stay local. Param groups with allow_data_parallelism=False are neither averaged nor
    copied. torch.amp.GradScaler may be used: a process whose gradients overflowed doesn't step, but averages.
    `state_dict` is that of `local_optimizer` with the number of steps so far: each process saves its own.
    Raises ValueError for what is not as said here, and what torch.distributed raises when processes are lost.
    """
    _require(alg in ALGORITHMS, f"alg = {alg!r}", _one_of(ALGORITHMS), nearest(str(alg), ALGORITHMS))
    _require(isinstance(local_optimizer, torch.optim.Optimizer), f"a local_optimizer of type {type(local_optimizer)}",
             "a torch.optim.Optimizer")
    arguments = _checked(arg_dict)
    return LocalSGD(local_optimizer, _checked_group(rank, world_size, group), rank, arguments)


class LocalSGD(torch.optim.Optimizer):
    """`local`, with parameters shared as `local_sgd_schedule` says; groups, state and defaults are those of `local`."""

    _step_supports_amp_scaling = True  # GradScaler then leaves it to `step` not to step

    def __init__(self, local: torch.optim.Optimizer, ranks: Sequence[int], rank: int,
                 arguments: Mapping[str, Any]) -> None:
        self.local, self._ranks, self._arguments = local, ranks, arguments
        self._is_first, self._steps = rank == ranks[0], 0
        self.__setstate__({})  # torch's hooks, without a second set of groups and state
        self._process_group = _process_group(ranks)
        self._copy(local.param_groups)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.local.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.local.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.local.defaults

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        now = turn(self._steps, **self._arguments)
        self._steps += 1
        steps = self._unscale() and (self._is_first or not now.alone)
        loss = self.local.step(closure) if steps else _evaluate(closure)
        if now.then == "average":
            self._average()
        elif now.then == "copy":
            self._copy(self.param_groups)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.local.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the parameters become those of the lowest rank."""
        self.local.add_param_group(param_group)
        self._copy(self.param_groups[-1:])

    def state_dict(self) -> dict[str, Any]:
        return {**self.local.state_dict(), "local_sgd": {"steps": self._steps}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raises ValueError where it is not of such an optimiser."""
        _require("local_sgd" in state_dict, f"a state dict with {', '.join(state_dict)}", "one with local_sgd")
        self.local.load_state_dict({key: value for key, value in state_dict.items() if key != "local_sgd"})
        self._steps = state_dict["local_sgd"]["steps"]

    def _unscale(self) -> bool:
        """Takes GradScaler's factor off the gradients; whether they are finite as far as it is known."""
        scale = getattr(self, "grad_scale", None)
        if getattr(self, "found_inf", 0):
            return False
        if scale is not None:
            for grad in (p.grad for group in self.param_groups for p in group["params"] if p.grad is not None):
                grad.div_(scale.to(grad.device))
        return True

    def _average(self) -> None:
        def mean(flat: Tensor) -> None:
            distributed.all_reduce(flat, group=self._process_group)
            flat.div_(len(self._ranks))
        self._exchange(self.param_groups, mean)

    def _copy(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self._exchange(groups, lambda flat: distributed.broadcast(flat, self._ranks[0], group=self._process_group))

    @torch.no_grad()
    def _exchange(self, groups: Sequence[Mapping[str, Any]], change: Callable[[Tensor], object]) -> None:
        """Lets `change` work on the parameters, as one flat vector for each device and dtype, float32 at least."""
        if len(self._ranks) == 1:
            return
        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for param in (p for group in groups if group.get("allow_data_parallelism", True) for p in group["params"]):
            alike.setdefault((param.device, torch.promote_types(param.dtype, torch.float32)), []).append(param)
        for (_, dtype), params in alike.items():
            flat = torch.cat([param.to(dtype).flatten() for param in params])
            change(flat)
            parts = torch.split(flat, [param.numel() for param in params])
            torch._foreach_copy_(params, [part.view_as(param) for part, param in zip(parts, params, strict=True)])


def _evaluate(closure: Callable[[], float] | None) -> float | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _process_group(ranks: Sequence[int]) -> distributed.ProcessGroup | None:
    """None: the whole world, or this process alone."""
    if len(ranks) == 1 or len(ranks) == distributed.get_world_size():
        return None
    group = distributed.new_group(ranks, use_local_synchronization=True)
    assert isinstance(group, distributed.ProcessGroup)
    return group


def _checked_group(rank: int, world_size: int, group: Sequence[int]) -> list[int]:
    """The ranks, sorted."""
    _require(isinstance(group, Sequence) and all(_is_count(each) for each in group), f"group = {group!r}",
             "the ranks of its processes")
    ranks = sorted(set(group))
    _require(len(ranks) == len(group), f"group = {group!r}", "every rank once")
    _require(world_size == len(ranks), f"world_size = {world_size!r}", f"{len(ranks)}, the number of ranks in group")
    _require(rank in ranks, f"rank = {rank!r}", f"one of the ranks in group, {ranks}")
    if len(ranks) > 1:
        _require(distributed.is_initialized(), "no process group", "torch.distributed.init_process_group before this")
        own, last = distributed.get_rank(), distributed.get_world_size() - 1
        _require(rank == own, f"rank = {rank}", f"{own}, that of this process in torch.distributed")
        _require(ranks[-1] <= last, f"group = {ranks}", f"ranks up to {last}, the last of torch.distributed")
    return ranks


def _checked(arg_dict: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of `local_sgd_schedule.turn`, under its names."""
    _require(isinstance(arg_dict, Mapping), f"arg_dict = {arg_dict!r}", "a dictionary")
    known, arguments = [*DEFAULTS, *ALIASES], dict[str, Any]()
    for key, value in arg_dict.items():
        _require(key in known, f"unknown key {key!r} in arg_dict", _one_of(known), nearest(str(key), known))
        name = ALIASES.get(key, key)
        _require(arguments.setdefault(name, value) == value, f"{key} = {value!r}", f"{arguments[name]!r}, as {name}")
    arguments = DEFAULTS | arguments
    for name, least in (("local_steps", 1), ("initial_steps", 0)):
        number = arguments[name]
        _require(_is_count(number) and number >= least, f"{name} = {number!r}", f"a whole number, {least} or more")
    method, methods = arguments["initial_step_method"], get_args(InitialStepMethod)
    _require(method in methods, f"initial_step_method = {method!r}", _one_of(methods), nearest(str(method), methods))
    return arguments


def _require(condition: bool, found: str, expected: str, mend: str = "") -> None:
    if not condition:
        raise ValueError(f"{found}; expected {expected}." + (f" {mend}" if mend else ""))


def _one_of(names: Sequence[str]) -> str:
    return " or ".join(repr(name) for name in names)


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0
