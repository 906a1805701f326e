"""What a worker tells of its device, and of its rounds."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from averaging.records import ABSENCES, BAD_VALUES, PeerRecord, Refusals, RoundEnd, Rounds, RoundSeconds
from peer.telemetry import after_round, gpu_memory


def test_the_memory_held_on_the_workers_own_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", {"cuda:0": 1000, "cuda:1": 2000}.__getitem__)
    assert gpu_memory("cuda:1") == {"gpu_memory_used_bytes": 2000}


@pytest.mark.parametrize("device", ["cpu", "mps", "none", ""])
def test_without_a_cuda_device_there_is_no_such_figure(device: str) -> None:
    assert gpu_memory(device) == {}


NEW = PeerRecord(peer_id="12D3ada", name="ada", state="training", epoch=0, samples_accumulated=0, samples_total=0,
                 samples_per_second=1.0, loss=None, group_size=0, version="0", device="cpu", client_mode=False,
                 time=0.0)


def test_rounds_are_summed_by_outcome_and_the_last_one_is_told() -> None:
    record = NEW
    for ended in (RoundEnd("gradients", "averaged", 0, group_size=3, seconds=2.0),
                  RoundEnd("gradients", "failed", 1, seconds=30.0), RoundEnd("gradients", "averaged", 2, seconds=1.5),
                  RoundEnd("gradients", "alone", 3)):
        record = replace(record, **after_round(record, ended))
    assert record == replace(NEW, group_size=1, rounds=Rounds(2, 1, 1), round_seconds=1.5,
                             seconds=RoundSeconds(3.5, 30.0))


def test_what_is_refused_is_told_by_the_kind_of_reason_and_nothing_is_left_out() -> None:
    reasons = Counter(BAD_VALUES + ABSENCES + ("forged statement", "token expired"))
    told = after_round(replace(NEW, refused=Refusals(1, 1, 1)), RoundEnd("gradients", "failed", 0, refused=reasons))
    assert told["refused"] == Refusals(1 + len(BAD_VALUES), 1 + len(ABSENCES), 3)
