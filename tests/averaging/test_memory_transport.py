"""The memory transport keeps the contract of transports/transport.py."""

import time

import pytest
import torch
from memory_peers import at_once
from torch import Tensor

from averaging.compression import error_bound
from averaging.transports.memory import MemorySwarm, MemoryTransport
from averaging.transports.transport import Outcome


def meet(transports: list[MemoryTransport], tensors: list[list[Tensor]], weights: list[float],
         **options: object) -> list[Outcome]:
    """One round of all."""
    group = [transport.peer_id for transport in transports]
    given = {"kind": "k", "epoch": 0, "group": group, **options}
    prints = given.pop("fingerprints", [b""] * len(group))
    states = given.pop("states", [()] * len(group))
    meetings = [transport.meet(mine, weight, fingerprint=fingerprint, state=state, **given)
                for transport, mine, weight, fingerprint, state in zip(
                    transports, tensors, weights, prints, states, strict=True)]
    return at_once([meeting.result for meeting in meetings])


def peers(count: int, **options: object) -> tuple[MemorySwarm, list[MemoryTransport]]:
    swarm = MemorySwarm(100, **options)
    return swarm, [swarm.join(str(number)) for number in range(count)]


def test_all_end_with_the_weighted_mean_and_equal_bits() -> None:
    _, transports = peers(3)
    tensors = [[torch.randn(3, 4), torch.randn(5)] for _ in range(3)]
    expected = [(1 * a + 2 * b + 5 * c) / 8 for a, b, c in zip(*tensors, strict=True)]
    outcomes = meet(transports, tensors, [1, 2, 5])
    assert [(o.averaged, o.members, o.with_state) for o in outcomes] == [(True, ("0", "1", "2"), False)] * 3
    for mine in tensors:
        torch.testing.assert_close(mine, expected)
        assert all(torch.equal(value, first) for value, first in zip(mine, tensors[0], strict=True))


def test_weight_0_contributes_nothing_not_even_a_nan_and_receives_the_mean() -> None:
    _, transports = peers(3)
    tensors = [[torch.ones(2)], [torch.full((2,), float("nan"))], [torch.zeros(2)]]
    meet(transports, tensors, [1, 0, 1])
    assert all(value.tolist() == [0.5, 0.5] for [value] in tensors)


def test_state_is_averaged_only_if_fingerprints_differ() -> None:
    for prints, mean in (([b"a", b"a"], [1.0, 3.0]), ([b"a", b"b"], [2.0, 2.0])):
        _, transports = peers(2)
        states = [[torch.tensor([1.0])], [torch.tensor([3.0])]]
        outcomes = meet(transports, [[torch.zeros(1)], [torch.zeros(1)]], [1, 1], fingerprints=prints, states=states)
        assert [state.item() for [state] in states] == mean
        assert {outcome.with_state for outcome in outcomes} == {prints[0] != prints[1]}


def test_who_is_lost_keeps_its_tensors_and_the_others_average_without() -> None:
    swarm, transports = peers(3)
    swarm.lost.add(("k", 0, "1"))
    tensors = [[torch.full((1,), float(number))] for number in range(3)]
    outcomes = meet(transports, tensors, [1, 1, 1])
    assert [value.item() for [value] in tensors] == [1, 1, 1]
    assert [outcome.averaged for outcome in outcomes] == [True, False, True]
    assert outcomes[0].members == ("0", "2")
    assert outcomes[1].reason


def test_a_failing_round_changes_nothing() -> None:
    swarm, transports = peers(2)
    swarm.failing.add(("k", 0))
    tensors = [[torch.zeros(1)], [torch.ones(1)]]
    outcomes = meet(transports, tensors, [1, 1])
    assert [value.item() for [value] in tensors] == [0, 1]
    assert not any(outcome.averaged or outcome.members for outcome in outcomes)


def test_who_does_not_come_is_left_behind_at_the_deadline() -> None:
    _, transports = peers(3, join_seconds=0.2)
    tensors = [[torch.zeros(1)], [torch.ones(1)]]
    started = time.monotonic()
    outcomes = meet(transports[:2], tensors, [1, 1], group=["0", "1", "2"])
    assert 0.1 < time.monotonic() - started < 5
    assert outcomes[0].members == ("0", "1")


def test_who_has_closed_is_not_waited_for() -> None:
    _, transports = peers(3)
    transports[2].close()
    started = time.monotonic()
    assert meet(transports[:2], [[torch.zeros(1)], [torch.ones(1)]], [1, 1], group=["0", "1", "2"])[0].averaged
    assert time.monotonic() - started < 5  # of 10 that a round waits


def test_a_meeting_that_is_cancelled_ends_for_this_peer_alone() -> None:
    _, transports = peers(3)
    group = ["0", "1", "2"]
    tensors = [torch.full((1,), float(number)) for number in range(3)]
    meetings = [transport.meet([tensor], 1, kind="k", epoch=0, group=group)
                for transport, tensor in zip(transports[:2], tensors, strict=False)]
    assert not meetings[0].done()
    meetings[0].cancel()
    assert meetings[0].done()
    assert not meetings[0].result().averaged
    last = transports[2].meet([tensors[2]], 1, kind="k", epoch=0, group=group)
    assert last.result().members == ("1", "2")
    assert [tensor.item() for tensor in tensors] == [0, 1, 1.5]


@pytest.mark.parametrize("codec", ["fp16", "blockwise8bit"])
def test_what_travels_encoded_arrives_within_the_codecs_bounds(codec: str) -> None:
    _, transports = peers(2)
    tensors = [[torch.randn(100)] for _ in range(2)]
    mean = (tensors[0][0] + tensors[1][0]) / 2
    bounds = sum(error_bound(codec, value) for [value] in tensors) / 2 + error_bound(codec, mean)
    meet(transports, tensors, [1, 1], compression=codec)
    error = (tensors[0][0] - mean).abs()
    assert error.max() > 0
    assert (error <= 1.01 * bounds).all()


def test_an_epoch_is_due_when_all_have_its_samples_or_one_is_further_on() -> None:
    _, (first, second) = peers(2)
    first.report(0, 60)
    second.report(0, 39)
    assert not first.is_due(0)
    second.report(0, 40)
    assert first.is_due(0)
    assert first.standing().samples == 100
    first.report(1, 0)
    assert second.is_due(0)
    assert not first.is_due(1)
    assert (second.standing().epoch, second.standing().samples) == (1, 40)


def test_in_a_fixed_world_an_epoch_is_due_by_a_peers_own_samples() -> None:
    swarm, (first, second) = peers(2, quota={"0": 10, "1": 20})
    for transport in (first, second):
        transport.report(0, 10)
    assert first.is_due(0)
    assert not second.is_due(0)
    first.report(5, 0)
    assert second.standing().epoch == 0
    assert swarm.join("2").standing().epoch == 5


def test_state_comes_from_who_is_furthest_and_of_the_majority() -> None:
    _, transports = peers(4)
    for transport, epoch, fingerprint in zip(transports, (0, 2, 2, 2), (b"", b"a", b"b", b"b"), strict=True):
        transport.report(epoch, 0, fingerprint)
        transport.offer_state(lambda transport=transport: {"who": torch.tensor(int(transport.peer_id))})
    assert transports[1].standing().minority
    assert not transports[2].standing().minority
    epoch, state = transports[0].fetch_state() or (0, {})
    assert epoch == 2
    assert state["who"] >= 2
