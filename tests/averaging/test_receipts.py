"""Receipts: of every round the samples that each member brought are told, once, whatever the strategy averages."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from threads_of_peers import Peer, fixed_world, together
from torch import Tensor

from averaging.config import Averaging
from averaging.receipts import BUDGET, LONGEST, Receipt, dump, parse
from averaging.transports.memory import MemoryTransport
from averaging.transports.transport import Outcome

BASE = {"target_batch_size": 24, "target_group_size": 8}
PEERS, STEPS, SIZES = 3, 4, (1, 2, 3)
OPTIONS: dict[str, dict[str, Any]] = {
    "collaborative": {}, "collaborative, in the background": {"strategy": "collaborative", "overlap": True},
    "local_sgd": {}, "diloco": {"local_steps": 4}, "gossip": {},
    "diloco, in fragments and the background": {"strategy": "diloco", "local_steps": 4, "fragments": 2, "delay": 2}}


class Noting:
    """A transport that keeps what became of each round, by epoch."""

    def __init__(self, transport: MemoryTransport, ends: dict[int, list[Outcome]]) -> None:
        self._transport, self._ends = transport, ends

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def meet(self, tensors: Sequence[Tensor], weight: float, *, epoch: int, **options: Any) -> Any:
        return _Meeting(self._transport.meet(tensors, weight, epoch=epoch, **options), self._ends[epoch])


class _Meeting:
    def __init__(self, meeting: Any, ends: list[Outcome]) -> None:
        self._meeting, self._ends = meeting, ends

    def __getattr__(self, name: str) -> Any:
        return getattr(self._meeting, name)

    def result(self) -> Outcome:
        outcome: Outcome = self._meeting.result()
        self._ends.append(outcome)
        return outcome


def rounds_of(config: Averaging, epochs: int) -> dict[int, list[Outcome]]:
    """Of three peers whose epochs have STEPS micro-batches of 1, 2 and 3 samples."""
    ends: dict[int, list[Outcome]] = defaultdict(list)

    def work(number: int) -> Any:
        def run(transport: MemoryTransport) -> None:
            peer = Peer(config, Noting(transport, ends), number)
            peer.run(STEPS * epochs, SIZES[number])
            peer.strategy.settle()
        return run
    together(fixed_world(config, SIZES, STEPS), [work(number) for number in range(PEERS)])
    return ends


@pytest.mark.parametrize("name", OPTIONS)
def test_each_member_is_told_the_epochs_samples_of_each_and_no_sample_twice(name: str) -> None:
    config = Averaging(**{**BASE, "strategy": name, **OPTIONS[name]})
    ends = rounds_of(config, epochs=3)
    told = {f"{peer:03d}": STEPS * SIZES[peer] for peer in range(PEERS)}
    assert ends.keys() == {0, 1, 2}
    for outcomes in ends.values():
        assert [outcome.samples for outcome in outcomes if outcome.averaged] == [told] * PEERS
    assert sum(told.values()) == config.target_batch_size


def test_samples_that_the_first_ones_alone_step_with_are_the_first_ones() -> None:
    config = Averaging(**BASE, strategy="local_sgd", initial_steps=1)
    ends = rounds_of(config, epochs=2)
    assert [outcome.samples for outcome in ends[0]] == [{"000": 4, "001": 0, "002": 0}] * PEERS
    assert [outcome.samples for outcome in ends[1]] == [{"000": 4, "001": 8, "002": 12}] * PEERS


def receipt(epoch: int, accepted: Mapping[str, int]) -> Receipt:
    return Receipt(epoch, epoch.to_bytes(16), accepted)


accepted = st.dictionaries(st.text(max_size=46), st.integers(0, 2**53 - 1), max_size=8)


@given(st.lists(st.builds(receipt, st.integers(0, 2**53 - 1), accepted), max_size=5))
def test_what_is_told_is_read(receipts: list[Receipt]) -> None:
    assert parse(dump(receipts)) == tuple(receipts)


def test_of_many_the_newest_are_told_and_of_a_large_group_one_is() -> None:
    small, large = {"Qm" + "x" * 44: 32, "Qm" + "y" * 44: 64}, {f"Qm{number:044d}": 32 for number in range(250)}
    many = [receipt(epoch, small) for epoch in range(200)]
    assert parse(dump(many)) == tuple(many[-len(parse(dump(many))):])
    assert len(dump(many)) <= BUDGET < len(dump(many)) + 200
    assert parse(dump([*many, receipt(200, large)])) == (receipt(200, large),)
    assert dump([receipt(0, large | {f"Qm{number:044d}" * 2: 1 for number in range(250)})]) == b""


@given(st.binary(max_size=200))
def test_whatever_a_stranger_writes_is_receipts_or_refused(data: bytes) -> None:
    try:
        parsed = parse(data)
    except ValueError:
        return
    assert all(len(each.group_id) == 16 and each.epoch < 2**53 for each in parsed)


@pytest.mark.parametrize("data", [
    b"\0" * (LONGEST + 1), "text", None, 3.0, {}, b"\xff",
    dump([Receipt(2**60, bytes(16), {})]), dump([Receipt(1, bytes(15), {})]),
    dump([Receipt(1, bytes(16), {"x": 2**60})]), dump([Receipt(1, bytes(16), {"x" * 200: 1})])])
def test_what_no_round_can_give_is_refused(data: object) -> None:
    with pytest.raises(ValueError, match="receipt"):
        parse(data)
