"""Averagers over libp2p: all or nothing, and no message lost."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, AsyncIterator  # noqa: UP035 - as in averaging/transports/swarm.py

import pytest
import torch
from hivemind.p2p import P2PContext
from hivemind.proto import averaging_pb2

from averaging.dht import DHT, open_identity, start_dht
from averaging.transports.swarm import Averager

PARTS = {"part_size_bytes": 256}  # 64 values: several parts a tensor


class ClosesEarly(Averager):
    """Fault: as a reducer it hangs up after its first part, like a peer that dies in the middle of a round."""

    _rpc_handlers = _stub_type = None

    async def rpc_aggregate_part(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], context: P2PContext
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        async for message in super().rpc_aggregate_part(stream, context):
            yield message
            return


ClosesEarly.__name__ = "Averager"  # peers find each other's handlers by it


@pytest.fixture(scope="module")
def dhts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[DHT]]:
    folder, nodes = tmp_path_factory.mktemp("keys"), []
    for number in range(3):
        path: Path = folder / f"{number}.key"
        open_identity(path)
        nodes.append(start_dht(identity_path=path, host_maddrs=["/ip4/127.0.0.1/tcp/0"], initial_peers=[
            str(maddr) for node in nodes[:1] for maddr in node.get_visible_maddrs()]))
    yield nodes
    for node in nodes:
        node.shutdown()


def averagers(dhts: list[DHT], prefix: str, kinds: list[type[Averager]]) -> list[Averager]:
    return [kind(averaged_tensors=[torch.full((300,), float(number)), torch.arange(200.0) * (number + 1) / 3],
                 dht=dht, prefix=prefix, target_group_size=len(kinds), min_matchmaking_time=1.0, request_timeout=0.5,
                 next_chunk_timeout=1.0, allreduce_timeout=5.0, client_mode=False, start=True, **PARTS)
            for number, (dht, kind) in enumerate(zip(dhts, kinds, strict=True))]


def run_round(members: list[Averager], **options: Any) -> list[BaseException | None]:
    """One round of all members: what each made of it, None for success."""
    steps = [member.step(wait=False, allow_retries=False, timeout=10.0, **options) for member in members]
    return [step.exception(timeout=30) for step in steps]


def tensors(member: Averager) -> list[torch.Tensor]:
    with member.get_tensors() as values:
        return [value.clone() for value in values]


def test_a_round_leaves_every_member_with_the_same_mean(dhts: list[DHT]) -> None:
    members = averagers(dhts, "mean", [Averager, Averager, Averager])
    try:
        assert run_round(members) == [None, None, None]
        torch.testing.assert_close(tensors(members[0]), [torch.ones(300), torch.arange(200.0) * 2 / 3])
        for member in members[1:]:
            for ours, theirs in zip(tensors(member), tensors(members[0]), strict=True):
                assert torch.equal(ours, theirs)
    finally:
        for member in members:
            member.kill_process()


def test_a_member_lost_in_mid_round_leaves_the_others_tensors_as_they_were(dhts: list[DHT]) -> None:
    members = averagers(dhts, "lost", [Averager, Averager, ClosesEarly])
    before = [tensors(member) for member in members]
    try:
        outcomes = run_round(members)
        assert all(outcome is not None for outcome in outcomes[:2])
        for member, was in zip(members[:2], before[:2], strict=True):
            assert all(torch.equal(ours, old) for ours, old in zip(tensors(member), was, strict=True))
    finally:
        for member in members:
            member.kill_process()


def test_no_round_of_forty_is_lost_or_partial(dhts: list[DHT]) -> None:
    members = averagers(dhts, "many", [Averager, Averager, Averager])
    try:
        for _ in range(40):
            assert run_round(members) == [None, None, None]
    finally:
        for member in members:
            member.kill_process()
