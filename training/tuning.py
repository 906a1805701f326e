"""What runs fastest here: found by measuring at the start, on the device that will train."""

import copy
import ctypes
import logging
from collections.abc import Sequence
from time import perf_counter

import torch
from torch import nn

from training.objectives.objective import Objective
from training.precision import Precision

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
BATCH = 32           # images of each size; fewer would keep a GPU busy with launching kernels, in any format
PIXELS = 16 * 96**2  # of a pass, about: with fewer, converting weights outweighs the rest, and the wrong format wins
GAIN = 0.97          # of the contiguous time: what is not faster than that is not worth the change
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
LARGEST_MMAP_THRESHOLD = 32 * 2**20          # that glibc allows, in bytes
log = logging.getLogger(__name__)


def keep_memory() -> bool:
    """Lets this process keep the memory that it frees, up to its peak; whether its C library can.

    A step on the CPU frees what the next one needs again; glibc hands it back to the kernel, which zeroes every page
    before it comes again: 3 to 6 % of a ResNet's step. (With M_MMAP_MAX = 0, which would keep larger blocks too,
    glibc 2.36 never gives an aligned block out again, and memory grows without end.)
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
                                        and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def lay_out(objective: Objective, wanted: str, sizes: Sequence[int], device: torch.device, precision: Precision) -> str:
    """Lays `objective` out in the memory format `wanted`, a key of FORMATS or "auto" for the fastest; which it was."""
    form = fastest_memory_format(objective, sizes, device, precision) if wanted == "auto" else FORMATS[wanted]
    objective.to(memory_format=form)
    return next(name for name, known in FORMATS.items() if known == form)


def fastest_memory_format(objective: Objective, sizes: Sequence[int], device: torch.device, precision: Precision, *,
                          budget_seconds: float = 6.0, turns: int = 3) -> torch.memory_format:
    """The memory format in which forward and backward passes of the trunk, over crops of `sizes`, take least time.

    For `objective.to(memory_format=...)`. Measured in alternating turns on a copy of the trunk: parameters, buffers
    and random numbers are left as they were. Once a first, slower round is over, no turn begins beyond the budget.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        trunks = {form: _copy(objective.backbone, form) for form in FORMATS.values()}
        started = perf_counter()
        seconds: dict[torch.memory_format, list[float]] = {form: [] for form in FORMATS.values()}
        for turn in range(turns + 1):  # the first is a warm-up: libraries choose their kernels in it
            for form, trunk in trunks.items():
                if turn > 1 and perf_counter() - started > budget_seconds:
                    break
                seconds[form].append(_seconds(trunk, form, sizes, device, precision))
    contiguous, channels_last = (min(seconds[form][1:]) for form in FORMATS.values())
    best = torch.channels_last if channels_last < GAIN * contiguous else torch.contiguous_format
    log.info("%s: a pass of the trunk took %.3f s contiguous, %.3f s channels_last", best, contiguous, channels_last)
    return best


def _copy(backbone: nn.Module, form: torch.memory_format) -> nn.Module:
    trunk = copy.deepcopy(backbone).to(memory_format=form).train()
    for module in trunk.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.eval()  # would wait for the other processes, which measure for themselves
    return trunk


def _seconds(trunk: nn.Module, form: torch.memory_format, sizes: Sequence[int], device: torch.device,
             precision: Precision) -> float:
    """How long one forward and backward pass takes over a small batch of each size; on a CPU, a smaller one."""
    images = [torch.randn(min(BATCH, max(4, PIXELS // size**2)) if device.type == "cpu" else BATCH, 3, size, size,
                          device=device).contiguous(memory_format=form) for size in sizes]
    _finish(device)
    started = perf_counter()
    with precision.autocast():
        features = torch.cat([trunk(crops) for crops in images])
    torch.autograd.backward(features.float().sum())
    trunk.zero_grad(set_to_none=True)
    _finish(device)
    return perf_counter() - started


def _finish(device: torch.device) -> None:
    """An accelerator works on while the host goes ahead."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
