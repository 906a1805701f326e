"""One group's all-reduce: everybody ends with the members' weighted mean, to the bit, or nobody has anything."""

import averaging.fork  # noqa: F401

# isort: split
import asyncio
import asyncio.subprocess
import os
import signal
import struct
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from functools import partial
from math import nan
from typing import Any, Literal, Protocol

import pytest
import torch
import uvloop
from hivemind.p2p import P2P, PeerID
from torch import Tensor

from averaging.compression import CODECS, error_bound
from averaging.messages import Layout, Member
from averaging.process import die_with_parent
from averaging.robust import centered_clip
from averaging.transports.swarm.all_reduce import STREAMS, AllReduce, Result
from averaging.transports.swarm.frames import ALIVE, DATA, LONGEST_TOKEN, STOP, Header, read_header
from averaging.transports.swarm.reduction import lay_out

TIMEOUT = 1.0  # seconds between signs of life, where the lack of them is tested
Mode = Literal["node", "client", "auxiliary"]
Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter


class Serving(Protocol):
    def serve(self, sender: str, reader: Reader, writer: Writer) -> Awaitable[None]: ...


class Node:
    """A peer's libp2p, and who serves the streams that it gets."""

    def __init__(self, p2p: P2P) -> None:
        self.p2p, self.id, self.groups = p2p, str(p2p.peer_id), dict[bytes, Serving]()

    async def handle(self, info: Any, reader: Reader, writer: Writer) -> None:
        header = await read_header(reader)
        if header.group_id in self.groups:
            await self.groups[header.group_id].serve(str(info.peer_id), reader, writer)
        writer.close()

    async def open(self, other: "Node", group_id: bytes, first: bytes = b"") -> tuple[Reader, Writer]:
        """A stream to `other`, without any AllReduce of ours."""
        _, reader, writer = await self.p2p.call_binary_stream_handler(PeerID.from_base58(other.id), STREAMS)
        writer.write(bytes(Header(group_id, b"")) + first)
        return reader, writer


class Mute:
    """A member that takes what it gets, and says nothing."""

    async def serve(self, sender: str, reader: Reader, writer: Writer) -> None:
        while await reader.read(1 << 16):
            pass


class Network:
    """Peers that know each other, in one event loop."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self.nodes: list[Node] = []
        self._groups = 0

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run `work`; nothing may go on after it that did not before."""
        return self.runner.run(self._without_remains(work))

    async def _without_remains(self, work: Coroutine[Any, Any, Any]) -> Any:
        before = asyncio.all_tasks()
        result = await asyncio.wait_for(work, 20)
        async with asyncio.timeout(2):
            while left := asyncio.all_tasks() - before - {asyncio.current_task()}:  # the handlers' own ends
                await asyncio.wait(left, timeout=0.01)
        return result

    async def add(self, **options: Any) -> Node:
        known = [str(maddr) for node in self.nodes[:1] for maddr in await node.p2p.get_visible_maddrs()]
        node = Node(await P2P.create(initial_peers=known or None, nat_port_map=False, auto_nat=False, **options))
        await node.p2p.add_binary_stream_handler(STREAMS, node.handle)
        self.nodes.append(node)
        return node

    async def add_all(self) -> None:
        await self.add()
        await asyncio.gather(*(self.add() for _ in range(3)))

    async def close(self) -> None:
        await asyncio.gather(*(node.p2p.shutdown() for node in self.nodes))

    def group(self, nodes: Sequence[Node], vectors: Sequence[Tensor | None], weights: Sequence[float] = (),
              modes: Sequence[Mode] = (), sections: Sequence[tuple[int, str]] = (), **options: Any) -> "Group":
        """A new group of all `nodes`, and the all-reduces of those that have a vector, or are auxiliary."""
        self._groups += 1
        size = next(vector.numel() for vector in vectors if vector is not None)
        sections = sections or [(size, "none")]
        modes, weights = modes or ["node"] * len(nodes), weights or [1.0 + place for place in range(len(nodes))]
        members = [Member(node.id, weight, mode, b"", Layout(size), b"")
                   for node, weight, mode in zip(nodes, weights, modes, strict=True)]
        group = Group(self._groups.to_bytes(16), weights)
        for node, vector, mode in zip(nodes, vectors, modes, strict=True):
            if vector is None and mode != "auxiliary":
                continue
            mean = None if vector is None else torch.zeros(size)
            one = AllReduce(p2p=node.p2p, group_id=group.id, me=node.id, members=members, vector=vector, mean=mean,
                            sections=sections, **{"chunk_timeout": 5.0, "timeout": 15.0, **options})
            group.members.append(one)
            node.groups[group.id] = one
        return group


class Group:
    """The all-reduces of one group."""

    def __init__(self, group_id: bytes, weights: Sequence[float]) -> None:
        self.id, self.weights, self.members = group_id, weights, list[AllReduce]()

    async def run(self) -> list[Result]:
        return await asyncio.gather(*(member.run() for member in self.members))

    @property
    def means(self) -> list[Tensor]:
        return [member.mean for member in self.members]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    network = Network()
    with pytest.MonkeyPatch.context() as patch, network.runner:
        patch.setattr(P2P, "_UNIX_SOCKET_PREFIX", f"/unix{tmp_path_factory.mktemp('p2p')}/")
        patch.setattr(asyncio.subprocess, "create_subprocess_exec",
                      partial(asyncio.subprocess.create_subprocess_exec, preexec_fn=die_with_parent))
        network.runner.run(network.add_all())
        yield network
        network.runner.run(network.close())


def random_vectors(count: int, size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count * size)
    return [torch.randn(size, generator=generator) * 10 ** place for place in range(count)]


def weighted_mean(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return sum((vector.double() * weight for vector, weight in zip(vectors, weights, strict=True)),
               start=torch.zeros(())) / sum(weights)


def assert_failed(result: Result, *blamed: Node) -> None:
    assert not result.complete
    assert result.blamed == tuple(node.id for node in blamed), result


@pytest.mark.parametrize("size", [3, 20_011, 1_300_003])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_everybody_ends_with_the_weighted_mean_to_the_bit(network: Network, count: int, size: int) -> None:
    vectors = random_vectors(count, size)
    group = network.group(network.nodes[:count], vectors)
    results = network.run(group.run())
    assert all(result.complete and not result.blamed and not result.refused for result in results), results
    expected = weighted_mean(vectors, group.weights)
    torch.testing.assert_close(group.means[0].double(), expected, rtol=1e-6, atol=1e-6 * 10 ** count)
    assert all(torch.equal(mean, group.means[0]) for mean in group.means)
    moved = 2 * (count - 1) * 4 * size  # every value from all but its reducer, and back
    assert sum(result.bytes_sent for result in results) == sum(result.bytes_received for result in results) == moved


def test_the_same_input_gives_the_same_bits(network: Network) -> None:
    vectors = random_vectors(3, 50_000)
    groups = [network.group(network.nodes[:3], vectors) for _ in range(3)]
    for group in groups:
        network.run(group.run())
    assert all(torch.equal(group.means[0], groups[0].means[0]) for group in groups)


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_gives_equal_bits_within_its_error(network: Network, codec: str) -> None:
    vectors, sections = random_vectors(3, 80_001), [(70_000, codec), (10_001, "none")]
    group = network.group(network.nodes[:3], vectors, sections=sections)
    assert all(result.complete for result in network.run(group.run()))
    assert all(torch.equal(mean, group.means[0]) for mean in group.means)
    expected = weighted_mean(vectors, group.weights)
    bound = (sum(error_bound(codec, vector[:70_000]).max() * weight / sum(group.weights)
                 for vector, weight in zip(vectors, group.weights, strict=True))
             + error_bound(codec, group.means[0][:70_000]).max() + 1e-4)
    assert (group.means[0] - expected)[:70_000].abs().max() <= bound
    torch.testing.assert_close(group.means[0][70_000:].double(), expected[70_000:], rtol=1e-6, atol=1e-4)


def test_an_auxiliary_reduces_and_a_client_only_sends(network: Network) -> None:
    vectors, modes = random_vectors(4, 200_000), ["node", "auxiliary", "node", "client"]
    group = network.group(network.nodes, [vectors[0], None, *vectors[2:]], modes=modes)
    results = network.run(group.run())
    assert all(result.complete for result in results), results
    expected = weighted_mean([vectors[0], *vectors[2:]], [1.0, 3.0, 4.0])
    means = [group.means[place] for place in (0, 2, 3)]
    torch.testing.assert_close(means[0].double(), expected, rtol=1e-6, atol=1e-2)
    assert all(torch.equal(mean, means[0]) for mean in means)
    assert results[1].bytes_received == results[1].bytes_sent > 4 * 3 * 60_000
    assert results[3].bytes_received == results[3].bytes_sent == 4 * 200_000


def test_one_reducer_serves_a_group_of_clients(network: Network) -> None:
    vectors = random_vectors(3, 100_001)
    group = network.group(network.nodes[:3], vectors, modes=["node", "client", "client"])
    assert all(result.complete for result in network.run(group.run()))
    torch.testing.assert_close(group.means[2].double(), weighted_mean(vectors, group.weights), rtol=1e-6, atol=1e-3)
    assert all(torch.equal(mean, group.means[0]) for mean in group.means)


def test_weight_nought_receives_the_mean_and_sends_nothing(network: Network) -> None:
    vectors = random_vectors(3, 60_000)
    vectors[1][7] = nan
    group = network.group(network.nodes[:3], vectors, weights=[1.0, 0.0, 2.0])
    assert all(result.complete for result in network.run(group.run()))
    expected = weighted_mean([vectors[0], vectors[2]], [1.0, 2.0])
    torch.testing.assert_close(group.means[1].double(), expected, rtol=1e-6, atol=1e-4)
    assert all(torch.equal(mean, group.means[0]) for mean in group.means)


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, nan], [2.0, -1.0]])
def test_weights_without_a_mean_average_nothing(network: Network, weights: list[float]) -> None:
    for result in network.run(network.group(network.nodes[:2], random_vectors(2, 10), weights).run()):
        assert_failed(result)


def test_clipping_is_centered_clip_of_every_chunk(network: Network) -> None:
    size = 50_000
    vectors = [*random_vectors(1, size), *random_vectors(1, size), torch.full((size,), 1e6)]
    vectors[1] = vectors[1] + 0.1
    group = network.group(network.nodes[:3], vectors, clip_radius=1.0)
    assert all(result.complete for result in network.run(group.run()))
    assert all(torch.equal(mean, group.means[0]) for mean in group.means)
    order = sorted(range(3), key=lambda place: network.nodes[place].id)
    stack = torch.stack([vectors[place] for place in order])
    weights = torch.tensor([group.weights[place] for place in order])
    for span in lay_out([(size, "none")], 3):
        for chunk in span:
            part = slice(chunk.start, chunk.start + chunk.values)
            torch.testing.assert_close(group.means[0][part], centered_clip(stack[:, part], weights, 1.0))
    assert group.means[0].abs().max() < 10


@pytest.mark.parametrize("clip_radius", [None, 1.0])
def test_values_too_large_for_sums_do_no_harm(network: Network, clip_radius: float | None) -> None:
    vectors = [*random_vectors(2, 1000), torch.full((1000,), 3e38)]
    group = network.group(network.nodes[:3], vectors, clip_radius=clip_radius)
    results = network.run(group.run())
    assert all(torch.isfinite(member.mean).all() for member, result in zip(group.members, results, strict=True)
               if result.complete)
    assert {name for result in results for name in result.blamed} <= {network.nodes[2].id}


def test_a_silent_member_is_blamed_by_all_within_the_timeout(network: Network) -> None:
    first, second, mute = network.nodes[:3]
    vectors = random_vectors(2, 400_000)
    group = network.group([first, second, mute], [*vectors, None], chunk_timeout=TIMEOUT)
    mute.groups[group.id] = Mute()
    kept = [vector.clone() for vector in vectors]

    async def work() -> float:
        begin = asyncio.get_running_loop().time()
        streams = [await mute.open(one, group.id, DATA + bytes(100)) for one in (first, second)]  # it had begun
        for result in await group.run():
            assert_failed(result, mute)
        for _, writer in streams:
            writer.close()
        return asyncio.get_running_loop().time() - begin

    assert TIMEOUT < network.run(work()) < 5 * TIMEOUT  # far from the deadline
    assert all(torch.equal(vector, copy) for vector, copy in zip(vectors, kept, strict=True))


def test_a_member_that_never_comes_is_blamed(network: Network) -> None:
    first, second, mute = network.nodes[:3]
    group = network.group([first, second, mute], [*random_vectors(2, 400_000), None],
                          modes=["node", "node", "client"], chunk_timeout=TIMEOUT / 2)
    for result in network.run(group.run()):
        assert_failed(result, mute)


def test_a_member_whose_libp2p_is_killed_is_blamed_at_once(network: Network) -> None:
    async def work() -> None:
        victim = await network.add()
        first, second = network.nodes[:2]
        group = network.group([first, second, victim], [*random_vectors(2, 400_000), None], chunk_timeout=20.0)
        victim.groups[group.id] = Mute()
        streams = [await victim.open(one, group.id, DATA + bytes(100)) for one in (first, second)]
        runs = asyncio.gather(*(member.run() for member in group.members))
        while not all(member.bytes_sent for member in group.members):
            await asyncio.sleep(0.01)
        begin = asyncio.get_running_loop().time()
        os.kill(victim.p2p._child.pid, signal.SIGKILL)
        for result in await runs:
            assert_failed(result, victim)
        assert asyncio.get_running_loop().time() - begin < 5.0
        network.nodes.remove(victim)
        for _, writer in streams:
            writer.close()
        await victim.p2p.shutdown()

    network.run(work())


@pytest.mark.parametrize(("codec", "first", "then", "reason"), [
    ("none", DATA + bytes(4 * 999) + struct.pack("<f", nan), b"", "non-finite"),
    ("fp16", DATA + bytes(2 * 999) + b"\x00\x7c", b"", "non-finite"),
    ("uniform8bit", DATA + struct.pack("<ff", 2.0, 1.0) + bytes(1000), b"", "misshapen"),
    ("none", b"\x07" + bytes(4000), b"", "misshapen"),
    ("none", DATA + bytes(4000) + DATA, bytes(4000), "oversize"),
    ("none", DATA + bytes(3999), b"close", "short"),
    ("none", b"", b"close", "short"),
    ("none", ALIVE * 20_000, b"", "flood"),
], ids=["nan", "inf", "no range", "garbage", "oversize", "short", "empty", "flood"])
def test_what_is_not_to_be_used_is_refused_counted_and_blamed(
        network: Network, codec: str, first: bytes, then: bytes, reason: str) -> None:
    one, other, bad = network.nodes[:3]
    vectors = random_vectors(2, 1000)
    group = network.group([one, other, bad], [*vectors, None], modes=["node", "client", "client"],
                          sections=[(1000, codec)])
    kept = [vector.clone() for vector in vectors]

    async def work() -> list[Result]:
        _, writer = await bad.open(one, group.id, first)
        reducing = asyncio.ensure_future(group.members[0].run())
        writer.close() if then == b"close" else writer.write(then)
        if reason == "oversize":  # what it owes is there: who came before the excess would have a whole average
            await asyncio.wait([reducing])
        results = await asyncio.gather(reducing, group.members[1].run())
        writer.close()
        return results

    results = network.run(work())
    for result in results:
        assert_failed(result, bad)
    assert results[0].refused == {reason: 1}
    assert all(torch.equal(vector, copy) for vector, copy in zip(vectors, kept, strict=True))


def test_a_reducer_that_sends_no_numbers_is_blamed(network: Network) -> None:
    honest, bad = network.nodes[:2]
    group = network.group([honest, bad], [*random_vectors(1, 100), None], modes=["client", "node"])

    class Liar:
        async def serve(self, sender: str, reader: Reader, writer: Writer) -> None:
            await reader.readexactly(1 + 400)
            writer.write(DATA + struct.pack("<f", nan) * 100)
            await reader.read(1)

    bad.groups[group.id] = Liar()
    result, = network.run(group.run())
    assert_failed(result, bad)
    assert result.refused == {"non-finite": 1}


def test_own_values_that_are_not_finite_are_not_sent(network: Network) -> None:
    vectors = random_vectors(2, 100_000)
    vectors[0][:] = nan
    group = network.group(network.nodes[:2], vectors)
    for result in network.run(group.run()):
        assert not result.complete
        assert set(result.blamed) <= {network.nodes[0].id}
    assert group.members[0].bytes_sent == 0


@pytest.mark.parametrize("pieces", [
    [ALIVE] * 4 + [DATA + bytes(4000)],
    [DATA] + [bytes(1000)] * 4,
], ids=["signs of life", "byte by byte"])
def test_who_is_slow_but_alive_is_waited_for_by_all(network: Network, pieces: list[bytes]) -> None:
    reducer, fast, slow = network.nodes[:3]
    vectors = random_vectors(2, 1000)
    group = network.group([reducer, fast, slow], [*vectors, None], modes=["node", "client", "client"],
                          chunk_timeout=TIMEOUT)

    async def work() -> tuple[list[Result], float]:
        begin = asyncio.get_running_loop().time()
        reader, writer = await slow.open(reducer, group.id)
        runs = asyncio.gather(*(member.run() for member in group.members))
        for piece in pieces:  # more than two timeouts in all
            await asyncio.sleep(0.6 * TIMEOUT)
            writer.write(piece)
        assert (await reader.readexactly(1 + 4000)).lstrip(ALIVE)[:1] in (DATA, b"")
        writer.close()
        return await runs, asyncio.get_running_loop().time() - begin

    results, seconds = network.run(work())
    assert all(result.complete for result in results), results
    assert seconds > 2 * TIMEOUT
    expected = weighted_mean([*vectors, torch.zeros(1000)], group.weights)
    torch.testing.assert_close(group.means[1].double(), expected, rtol=1e-6, atol=1e-6)


def test_streams_that_are_not_due_are_refused_and_harm_nobody(network: Network) -> None:
    one, other, stranger = network.nodes[:3]
    vectors = random_vectors(2, 1000)
    group = network.group([one, other], vectors, modes=["node", "client"], chunk_timeout=2.0)

    async def work() -> list[Result]:
        reader, writer = await stranger.open(one, group.id, DATA + bytes(4000))
        assert await reader.read() == b""
        writer.close()
        reader, writer = await one.open(other, group.id, DATA + bytes(4000))  # a client reduces nothing
        assert await asyncio.wait_for(reader.read(), 1) == b""
        writer.close()
        run = asyncio.create_task(group.members[0].run())
        streams = [await other.open(one, group.id) for _ in range(2)]
        assert await asyncio.wait_for(_first_end([reader for reader, _ in streams]), 1) == b""
        group.members[0].stop()
        return [await run]

    result, = network.run(work())
    assert result.refused == {"stranger": 1, "duplicate": 1}
    assert_failed(result)


async def _first_end(readers: Sequence[Reader]) -> bytes:
    done, rest = await asyncio.wait([asyncio.create_task(reader.read()) for reader in readers],
                                    return_when=asyncio.FIRST_COMPLETED)
    for task in rest:
        task.cancel()
    return done.pop().result().lstrip(ALIVE)


@pytest.mark.parametrize("end", [AllReduce.stop, None], ids=["stopped", "cancelled"])
def test_giving_up_leaves_nothing_behind_and_blames_nobody(
        network: Network, end: Callable[[AllReduce], None] | None) -> None:
    first, second, mute = network.nodes[:3]
    vectors = random_vectors(2, 400_000)
    group = network.group([first, second, mute], [*vectors, None], chunk_timeout=2.0)
    mute.groups[group.id] = Mute()
    kept = [vector.clone() for vector in vectors]

    async def work() -> Result:
        quitter, other = (asyncio.create_task(member.run()) for member in group.members)
        while not all(member.bytes_sent for member in group.members):
            await asyncio.sleep(0.01)
        quitter.cancel() if end is None else end(group.members[0])
        await asyncio.wait([quitter])
        assert quitter.cancelled() == (end is None)
        return await other

    assert_failed(network.run(work()))
    assert all(torch.equal(vector, copy) for vector, copy in zip(vectors, kept, strict=True))


def test_a_latecomer_hears_that_it_is_over(network: Network) -> None:
    first, late = network.nodes[:2]
    group = network.group([first, late], random_vectors(2, 200_000))

    async def work() -> Result:
        group.members[0].stop()
        assert not (await group.members[0].run()).complete
        return await group.members[1].run()

    assert_failed(network.run(work()))


def test_everything_ends_at_the_deadline(network: Network) -> None:
    first, second = network.nodes[:2]
    group = network.group([first, second], [*random_vectors(1, 1000), None], modes=["node", "client"], timeout=0.5,
                          chunk_timeout=2.0)

    async def work() -> list[Result]:
        _, writer = await second.open(first, group.id)
        run = asyncio.create_task(group.members[0].run())
        while not run.done():
            writer.write(ALIVE)
            await asyncio.sleep(0.05)
        writer.close()
        return [run.result()]

    result, = network.run(work())
    assert_failed(result, second)  # alive, but it has not sent what is due
    assert "0.5 s" in result.reason


@pytest.mark.parametrize(("sent", "fault"), [
    (struct.pack(">16sH", bytes(16), LONGEST_TOKEN + 1), "oversize token"),
    (bytes(17), "ended"),
])
def test_a_header_that_is_too_long_or_too_short_is_refused(sent: bytes, fault: str) -> None:
    async def work() -> Header:
        reader = asyncio.StreamReader()
        reader.feed_data(sent)
        reader.feed_eof()
        return await read_header(reader)

    with pytest.raises(ValueError, match=fault):
        asyncio.run(work())


@pytest.mark.parametrize("reducers", [1, 2, 3, 7])
@pytest.mark.parametrize("sections", [
    [(1, "none")], [(100_003, "fp16"), (5, "none")], [(9_000_000, "uniform8bit")] * 2])
def test_chunks_cover_every_value_once_and_no_two_sections(sections: list[tuple[int, str]], reducers: int) -> None:
    spans = lay_out(sections, reducers)
    assert len(spans) == reducers
    chunks = [chunk for span in spans for chunk in span]
    assert [chunk.start for chunk in chunks] == [
        sum(chunk.values for chunk in chunks[:place]) for place in range(len(chunks))]
    for section, (values, codec) in enumerate(sections):
        assert sum(chunk.values for chunk in chunks if chunk.section == section and chunk.codec == codec) == values
    assert max(map(len, spans)) - min(map(len, spans)) <= 1


def test_stop_names_whom_to_blame_only_if_it_is_another_member(network: Network) -> None:
    first, bearer, third = network.nodes[:3]
    order = sorted([first.id, bearer.id, third.id])
    for number, blamed in [(order.index(third.id), [third]), (order.index(first.id), []), (0xFFFF, []), (77, [])]:
        group = network.group([first, bearer, third], [*random_vectors(1, 10), None, None],
                              modes=["node", "client", "client"])

        async def work(group: Group = group, number: int = number) -> list[Result]:
            _, writer = await bearer.open(first, group.id, STOP + number.to_bytes(2))
            results = await group.run()
            writer.close()
            return results

        result, = network.run(work())
        assert_failed(result, *blamed)
