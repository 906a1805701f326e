"""Telling and reading at the nodes that hold a key: only news travels, nobody is believed, and who is gone delays none.

Four nodes of a real DHT; an answer carries 4 kB of entries at most, so that what is told here takes several.
"""

from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer, get_dht_time
from processes import until

import averaging.holders
from averaging.dht import DHT, open_identity, start_dht

KEY, MANY = "board", 40


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[DHT]]:
    folder, nodes = tmp_path_factory.mktemp("holders"), list[DHT]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(averaging.holders, "ANSWER_BYTES", 4096)
        for number in range(4):
            path: Path = folder / f"{number}.key"
            known = [str(address) for dht in nodes[:1] for address in dht.get_visible_maddrs()]
            nodes.append(start_dht(identity_path=path, host_maddrs=["/ip4/127.0.0.1/tcp/0"], initial_peers=known,
                                   record_validators=[RSASignatureValidator(open_identity(path))]))
    yield nodes
    for dht in nodes:
        dht.shutdown()


def read(dht: DHT, key: str = KEY) -> dict[Any, Any]:
    return {subkey: MSGPackSerializer.loads(value) for subkey, (value, _) in dht.look(key).result(10).items()}


def tell(dht: DHT, subkey: Any, value: Any, key: str = KEY) -> bool:
    return bool(dht.tell(key, subkey, value, get_dht_time() + 60).result(10))


def test_all_that_is_told_is_read_though_it_takes_several_answers(nodes: list[DHT]) -> None:
    told = {b"%d" % number: "x" * 300 + str(number) for number in range(MANY)}
    assert all(tell(nodes[0], subkey, value) for subkey, value in told.items())
    assert [read(dht) for dht in nodes] == [told] * 4


def test_a_second_answer_holds_what_is_new_and_nothing_else(nodes: list[DHT]) -> None:
    read(nodes[1])
    assert tell(nodes[2], b"7", "news")
    assert nodes[1].run_coroutine(subkeys_of_each_answer) == [{b"7"}] * 3
    assert read(nodes[1])[b"7"] == "news"
    assert nodes[1].run_coroutine(subkeys_of_each_answer) == [set()] * 3


async def subkeys_of_each_answer(dht: DHT, node: DHTNode) -> list[set[bytes]]:
    """What the others would send to this node, by what it has read."""
    key = DHTID.generate(KEY)
    named = b"".join(averaging.holders._digest(subkey, expires)
                     for subkey, (_, expires) in dht._holders._found[key].items())
    request = dht_pb2.FindRequest(keys=[key.to_bytes(), named])
    answers = [await dht._holders.get_stub(node.p2p, peer).rpc_news(request, timeout=5)
               for peer in node.protocol.routing_table.uid_to_peer_id.values()]
    return [{subkey for subkey, _, _ in MSGPackSerializer.loads(answer.results[0].value)} for answer in answers]


def test_what_a_holder_forges_is_not_read_and_the_rest_is(nodes: list[DHT]) -> None:
    owner = RSASignatureValidator().local_public_key  # whose private key none of the nodes has
    for dht in nodes[1:]:
        dht.run_coroutine(forge_entry(owner))
    assert tell(nodes[1], b"true", 1, "forged")
    assert read(nodes[0], "forged") == {b"true": 1}


class forge_entry:  # a function with an argument, for another process
    """Put an entry that nobody has signed into a node's storage, past all checks."""

    def __init__(self, owner: bytes) -> None:
        self.owner = owner

    async def __call__(self, dht: DHT, node: DHTNode) -> None:
        value = MSGPackSerializer.dumps("forged")
        node.protocol.storage.store(DHTID.generate("forged"), value, get_dht_time() + 60, subkey=self.owner)


@pytest.mark.parametrize("answer", [b"", b"\xc1", b"garbage", MSGPackSerializer.dumps([[1, 2]]),
                                    MSGPackSerializer.dumps([[b"a", "text", 1e12]])])
def test_a_holder_that_talks_nonsense_is_passed_over(nodes: list[DHT], answer: bytes) -> None:
    assert tell(nodes[1], b"true", 1, "nonsense")
    nodes[3].run_coroutine(talk_nonsense(answer))
    try:
        for dht in nodes[:3]:
            assert read(dht, "nonsense") == {b"true": 1}
    finally:
        nodes[3].run_coroutine(talk_nonsense(None))


class talk_nonsense:
    """Answer every reader with these bytes; None: as is right."""

    def __init__(self, answer: bytes | None) -> None:
        self.answer = answer

    async def __call__(self, dht: DHT, node: DHTNode) -> None:
        answer = self.answer

        async def nonsense(request: dht_pb2.FindRequest, context: object) -> dht_pb2.FindResponse:
            return dht_pb2.FindResponse(results=[dht_pb2.FindResult(value=answer)])

        await dht._holders.remove_p2p_handlers(node.p2p)
        if answer is None:
            await dht._holders.serve()
        else:
            await node.p2p.add_protobuf_handler("Holders.rpc_news", nonsense, dht_pb2.FindRequest)


def test_who_is_gone_keeps_nobody_from_telling_and_reading(nodes: list[DHT]) -> None:
    gone = nodes.pop()
    gone.kill()
    gone.join()
    gone.shutdown()
    began = monotonic()
    for number, dht in enumerate(nodes):
        assert tell(dht, b"%d" % number, number, "after")
    until(lambda: all(len(read(dht, "after")) == len(nodes) for dht in nodes), "what each has told")
    assert monotonic() - began < 20
