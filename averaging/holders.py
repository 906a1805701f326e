"""A dictionary in the DHT, written and read at the few nodes that hold it, for what is new only.

hivemind's own `store` and `get` ask up to twenty nodes on their way, and each that holds the key answers with all that
is under it: with n records a peer receives some 6 n of them to tell one of its own, and 6 n again to read. Here the
holders are found by asking for the key's neighbour, under which there is nothing, and are then spoken to directly: a
record goes to each of them, and a reader names what it has, by digests, and is sent the rest.

All of this runs in the DHT's process. Whoever answers is believed nothing: every entry is checked as hivemind checks
it (signature, schema), once, and a holder that keeps something back is made up for by the others.
"""

import asyncio
import random
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from struct import pack
from time import monotonic
from typing import Any

from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import P2PContext, PeerID, ServicerBase
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer, get_dht_time
from hivemind.utils.auth import AuthRole, AuthRPCWrapper

ASKED = 2  # holders that a reading asks, this node included if it is one
PATIENCE_SECONDS = 0.5  # for one holder, before another is asked as well
SEARCH_SECONDS = 60.0  # between two searches for the holders; a node that calls meanwhile is taken in at once
ANSWER_BYTES = 1 << 20  # of entries in an answer, or little more: libp2p's daemon carries at most twice this
MOST_ANSWERS = 32  # of one holder to one reading
DIGEST_BYTES = 8
Found = dict[Any, tuple[bytes, float]]  # by subkey: a value in msgpack, unsigned, and when it expires (DHT time)


class Holders(ServicerBase):  # type: ignore[misc]  # hivemind is untyped
    """What `node` holds, for others to read; and what others hold, for `node` to read and write."""

    def __init__(self, node: DHTNode) -> None:
        self._node, self._protocol = node, node.protocol
        self._searched: dict[DHTID, tuple[float, Mapping[DHTID, PeerID]]] = {}  # when, and who is near
        self._found: dict[DHTID, Found] = {}

    async def serve(self) -> None:
        """Answer others from now on."""
        await self.add_p2p_handlers(self._node.p2p, AuthRPCWrapper(self, AuthRole.SERVICER, self._protocol.authorizer))

    async def rpc_news(self, request: dht_pb2.FindRequest, context: P2PContext) -> dht_pb2.FindResponse:
        """Of what is here under the first of `keys`, what the second, a row of digests, does not name."""
        key, named = (*request.keys, b"", b"")[:2]
        known = {named[at:at + DIGEST_BYTES] for at in range(0, len(named), DIGEST_BYTES)}
        news, size = [], 0
        for subkey, (value, expires) in self._held(DHTID.from_bytes(key)):
            if _digest(subkey, expires) not in known and size <= ANSWER_BYTES:
                news.append((subkey, value, expires))
                size += _size(subkey, value)
        return dht_pb2.FindResponse(results=[dht_pb2.FindResult(value=MSGPackSerializer.dumps(news))])

    async def store(self, key: str, subkey: Any, value: Any, expires: float) -> bool:
        """Sign an entry and store it at the nearest nodes that answer; whether any took it."""
        key_id, wanted, tasks, taken = DHTID.generate(key), self._node.num_replicas, set[asyncio.Task[bool | None]](), 0
        signed = self._signed(key_id, subkey, value, expires)
        candidates, silent = iter((await self._near(key_id)).items()), 0
        while wanted:
            for _ in range(wanted - len(tasks)):
                if (nearest := next(candidates, None)) is not None:
                    tasks.add(asyncio.create_task(self._store_at(nearest, key_id, subkey, (signed, expires))))
            if not tasks:
                break
            done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            answers = [task.result() for task in done]
            wanted -= sum(answer is not None for answer in answers)
            taken += sum(bool(answer) for answer in answers)
            silent += answers.count(None)
        if silent:
            self._searched[key_id] = 0.0, self._searched[key_id][1]  # the next search may find others
        return taken > 0

    async def read(self, key: str) -> Found:
        """All entries that ASKED holders have, or fewer where so many do not answer, and all that were read before."""
        key_id = DHTID.generate(key)
        found = self._found.setdefault(key_id, {})
        self._take(key_id, found, ((subkey, *held) for subkey, held in self._held(key_id)))
        near = list((await self._near(key_id)).items())[:self._node.num_replicas]
        wanted = min(ASKED, len(near)) - any(node == self._node.node_id for node, _ in near)
        others = [(node, peer) for node, peer in near
                  if node != self._node.node_id and peer not in self._node.blacklist]
        await self._ask(key_id, found, random.sample(others, len(others)), wanted)
        now = get_dht_time()
        self._found[key_id] = {subkey: entry for subkey, entry in found.items() if entry[1] >= now}
        return self._found[key_id]

    async def _ask(self, key_id: DHTID, found: Found, holders: list[tuple[DHTID, PeerID]], wanted: int) -> None:
        """Until `wanted` have answered; one after the other, so that the second sends only what the first has not."""
        tasks = set[asyncio.Task[bool]]()
        while wanted > 0 and (holders or tasks):
            if holders:
                tasks.add(asyncio.create_task(self._news_of(*holders.pop(), key_id, found)))
            done, tasks = await asyncio.wait(tasks, timeout=PATIENCE_SECONDS if holders else None,
                                             return_when=asyncio.FIRST_COMPLETED)
            wanted -= sum(task.result() for task in done)
        for task in tasks:
            task.cancel()

    async def _news_of(self, node: DHTID, peer: PeerID, key_id: DHTID, found: Found) -> bool:
        """Put what the holder has into `found`; whether it answered."""
        for _ in range(MOST_ANSWERS):
            named = b"".join(_digest(subkey, expires) for subkey, (_, expires) in found.items())
            request = dht_pb2.FindRequest(keys=[key_id.to_bytes(), named])
            try:
                answer = await AuthRPCWrapper(self.get_stub(self._node.p2p, peer), AuthRole.CLIENT,
                                              self._protocol.authorizer).rpc_news(
                    request, timeout=self._protocol.wait_timeout)
                news = [(subkey, value, float(expires)) for subkey, value, expires in
                        MSGPackSerializer.loads(answer.results[0].value)]
                self._take(key_id, found, news)
            except Exception:  # it is gone, or talks nonsense: whatever it is, others are asked
                await self._lost(node, peer)
                return False
            if sum(_size(subkey, value) for subkey, value, _ in news) <= ANSWER_BYTES:
                break
        self._node.blacklist.register_success(peer)
        return True

    def _take(self, key_id: DHTID, found: Found, entries: Iterable[tuple[Any, bytes, float]]) -> None:
        """Put into `found` what is newer and holds good."""
        for subkey, value, expires in entries:
            if expires < get_dht_time() or (subkey in found and found[subkey][1] >= expires):
                continue
            record = DHTRecord(key_id.to_bytes(), MSGPackSerializer.dumps(subkey), value, expires)
            validator = self._protocol.record_validator
            if validator is None or validator.validate(record):
                found[subkey] = (validator.strip_value(record) if validator else value, expires)

    def _held(self, key_id: DHTID) -> Iterator[tuple[Any, Any]]:
        held = self._protocol.storage.get(key_id)
        if held is not None and isinstance(held.value, DictionaryDHTValue):
            yield from held.value.items()

    async def _near(self, key_id: DHTID) -> Mapping[DHTID, PeerID]:
        """The nodes nearest to a key, the nearest first, this one included unless it takes no calls; who did not answer
        lately comes last."""
        since, near = self._searched.get(key_id, (0.0, {}))
        if monotonic() - since > SEARCH_SECONDS:
            empty = DHTID(key_id ^ 1)  # has the same neighbours, and no value that they would answer with
            found = (await self._node.find_nearest_nodes([empty], exclude_self=self._protocol.client_mode))[empty]
            near = found if len(found) > self._node.num_replicas else {**near, **found}  # cut off? they may return
            self._searched[key_id] = monotonic(), near
        table = self._protocol.routing_table.get_nearest_neighbors(
            key_id, self._node.num_replicas, exclude=self._node.node_id)
        near = {**near, **dict(table)}
        return {node: near[node] for node in sorted(near, key=lambda node: (
            near[node] in self._node.blacklist, key_id.xor_distance(node)))}

    async def _store_at(self, holder: tuple[DHTID, PeerID], key_id: DHTID, subkey: Any,
                        entry: tuple[bytes, float]) -> bool | None:
        """Whether it took the entry; None: it did not answer."""
        (node, peer), (signed, expires) = holder, entry
        if node == self._node.node_id:
            return bool(self._protocol.storage.store(key_id, signed, expires, subkey=subkey))
        answer = await self._protocol.call_store(peer, [key_id], [signed], expires, subkeys=[subkey])
        if answer is None:
            await self._lost(node, peer)
            return None
        self._node.blacklist.register_success(peer)
        return bool(answer) and answer[0]

    async def _lost(self, node: DHTID, peer: PeerID) -> None:
        self._node.blacklist.register_failure(peer)
        await self._protocol.update_routing_table(node, peer, responded=False)

    def _signed(self, key_id: DHTID, subkey: Any, value: Any, expires: float) -> bytes:
        plain = MSGPackSerializer.dumps(value)
        record = DHTRecord(key_id.to_bytes(), MSGPackSerializer.dumps(subkey), plain, expires)
        validator = self._protocol.record_validator
        return bytes(validator.sign_value(record)) if validator else plain


def _digest(subkey: Any, expires: float) -> bytes:
    named = subkey if isinstance(subkey, bytes) else MSGPackSerializer.dumps(subkey)
    return blake2b(named + pack("<d", expires), digest_size=DIGEST_BYTES).digest()


def _size(subkey: Any, value: bytes) -> int:
    return len(value) + (len(subkey) if isinstance(subkey, bytes) else DIGEST_BYTES)
