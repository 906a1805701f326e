"""BatchNorm over the batches of several processes (`model.sync_bn`)."""

import copy
import os
from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist

from training.errors import BadInput
from training.models.config import SyncBn


def synchronise(module: nn.Module, config: SyncBn, *, log: Callable[[str], None]) -> nn.Module:
    """`module` with every BatchNorm in it synchronised as `config` says; parameters and names stay.

    A process on its own has nothing to synchronise with and gets `module` back. All processes must call it.
    Raises BadInput if the groups don't divide the processes.
    """
    if not config.convert_bn_to_sync_bn or not dist.is_initialized() or dist.get_world_size() == 1:
        return module
    if config.sync_bn_type == "apex":
        log("model.sync_bn.sync_bn_type = apex: PyTorch's own SyncBatchNorm is used, which has replaced Apex's")
    group = _process_group(config.group_size)
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module, group)  # type: ignore[no-untyped-call]
    for layer in converted.modules():
        if isinstance(layer, nn.SyncBatchNorm):
            layer.__class__ = _Synchronised  # the conversion can't be told of a subclass
    return converted


def _process_group(group_size: int) -> dist.ProcessGroup | None:
    """The process group that this process belongs to; None for all processes, where they are no more than that."""
    world = dist.get_world_size()
    size = _processes_of_this_machine() if group_size == -1 else group_size
    if size == 0 or size >= world:
        return None
    if world % size:
        raise BadInput(f"{world} processes in groups of {size} for model.sync_bn.group_size = {group_size}",
                       expected="a number of processes that the groups divide",
                       mend="Choose a group_size that divides it, or 0 for one group of all.")
    group, _ = dist.new_subgroups(size)
    return group


def _processes_of_this_machine() -> int:
    if "LOCAL_WORLD_SIZE" not in os.environ:
        raise BadInput("model.sync_bn.group_size = -1 without LOCAL_WORLD_SIZE in the environment",
                       expected="the number of this machine's processes there",
                       mend="Start with torchrun, which sets it, or give the number as group_size.")
    return int(os.environ["LOCAL_WORLD_SIZE"])


class _Synchronised(nn.SyncBatchNorm):
    """PyTorch's, which refuses to be copied, and tensors of the CPU: there, the same in plain operations."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy belongs to the same processes: a process group is no data."""
        memo[id(self.process_group)] = self.process_group
        memo[id(self)] = twin = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape and dtype; statistics in float32 at least."""
        y: Tensor = self._on_cpu(x) if self.training and x.device.type == "cpu" else super().forward(x)
        return y

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _on_cpu(self, x: Tensor) -> Tensor:
        every = [0, *range(2, x.ndim)]
        channels = [1, -1, *[1] * (x.ndim - 2)]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = wide.new_tensor([x.numel() // x.shape[1]])
        sums = _sum_over_processes(torch.cat([wide.sum(every), count]), self.process_group)
        mean, count = sums[:-1] / sums[-1], sums[-1]
        centred = wide - mean.view(channels)
        variance = _sum_over_processes(centred.square().sum(every), self.process_group) / count
        if self.track_running_stats:
            self._track(mean, variance, count)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        y: Tensor = centred * scale.view(channels) + self.bias.view(channels)
        return y.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        weight = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.item()
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(variance * count / (count - 1), weight)


def _sum_over_processes(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return cast(Tensor, _Sum.apply(x, group))


class _Sum(torch.autograd.Function):
    """The sum over processes. Each one's loss depends on it, so the gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
