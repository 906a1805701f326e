"""What a worker tells of its device."""

import pytest
import torch

from peer.telemetry import gpu_memory


def test_the_memory_held_on_the_workers_own_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", {"cuda:0": 1000, "cuda:1": 2000}.__getitem__)
    assert gpu_memory("cuda:1") == {"gpu_memory_used_bytes": 2000}


@pytest.mark.parametrize("device", ["cpu", "mps", "none", ""])
def test_without_a_cuda_device_there_is_no_such_figure(device: str) -> None:
    assert gpu_memory(device) == {}
