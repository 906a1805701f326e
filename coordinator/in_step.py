"""Keeping in step with the other coordinators of the run: each asks the others every few seconds what they know."""

import asyncio
import logging
import time
from contextlib import suppress
from itertools import count

import grpc

from averaging.membership import exchange_words
from coordinator.authority import Authority
from coordinator.calls import explain
from coordinator.facts import CoordinatorFact, Facts, by_key
from coordinator.link import parse_link
from coordinator.replica import Own, heard_lately, others
from coordinator.tls import connect
from coordinator.wire import decode, digest, encode
from proto.replica_pb2 import CoordinatorFact as CoordinatorMessage
from proto.replica_pb2 import ExchangeReply, ExchangeRequest, ExchangeWords
from proto.replica_pb2_grpc import ReplicaStub

ASK_SECONDS = 3.0
ANSWER_SECONDS = 10.0
LONGEST_REPLY = 64 << 20  # bytes: some 100,000 members
OWN_SECONDS = 3600.0      # after which the others are told again where this one is
SELDOM = 100              # turns between two attempts at one that was not heard of for a week: it may come back
log = logging.getLogger("covey.coordinator")


class InStep:
    """With the coordinators that the ledger of `authority` knows. `heard`: when each last answered, Unix seconds, by
    its HOST:PORT; 0 if it has not since this one started."""

    def __init__(self, authority: Authority, own: Own) -> None:
        self._authority, self._own = authority, own
        self._complaints: dict[str, str] = {}
        self.heard: dict[str, float] = {}
        self._introduce()

    def _introduce(self) -> None:
        now, known = time.time(), self._authority.ledger.facts().coordinators.get(self._own.peer_id)
        fact = self._own.fact(now)
        if known is None or now - known.time > OWN_SECONDS or (known.link, known.addresses) != (
                fact.link, fact.addresses):
            self._authority.ledger.learn(Facts(coordinators=by_key([fact])))

    async def keep(self, stop: asyncio.Event) -> None:
        """Until `stop` is set. What fails is logged when it changes, and tried again."""
        for turn in count():
            if stop.is_set():
                return
            there = others(await asyncio.to_thread(self._authority.ledger.facts), self._own)
            lately = heard_lately(there, time.time())
            self.heard = {address: self.heard.get(address, 0.0)
                          for address in (parse_link(other.link).address for other in lately)}
            await asyncio.gather(*map(self._try, there if turn % SELDOM == 0 else lately))
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), ASK_SECONDS)

    async def _try(self, other: CoordinatorFact) -> None:
        address = parse_link(other.link).address
        try:
            await self._ask(other)
        except Exception as error:  # whatever it is, this coordinator goes on without the other
            if self._complaints.get(address) != str(error):
                log.warning("not in step with the coordinator at %s: %s", address, str(error) or type(error).__name__)
            self._complaints[address] = str(error)
        else:
            if self._complaints.pop(address, None) is not None or not self.heard.get(address):
                log.info("in step with the coordinator at %s", address)
            self.heard[address] = time.time()

    async def _ask(self, other: CoordinatorFact) -> None:
        link, ledger = parse_link(other.link), self._authority.ledger
        await asyncio.to_thread(self._introduce)
        request = await asyncio.to_thread(self._request, link.certificate)
        async with await connect(link, timeout_seconds=ANSWER_SECONDS, longest_reply=LONGEST_REPLY) as channel:
            try:
                reply: ExchangeReply = await ReplicaStub(channel).Exchange(request, timeout=ANSWER_SECONDS)
            except grpc.aio.AioRpcError as error:
                raise explain(link, error) from None
        if reply.HasField("facts"):
            await asyncio.to_thread(ledger.learn, decode(reply.facts))
        await asyncio.to_thread(self._authority.ban_file.offer, reply.bans)

    def _request(self, callee: str) -> ExchangeRequest:
        known = self._authority.ledger.facts()
        caller = CoordinatorMessage(**vars(known.coordinators[self._own.peer_id]))
        words = ExchangeWords(run_id=self._own.link.run_id, callee=callee, time=time.time(), caller=caller,
                              known=digest(encode(known))).SerializeToString()
        return ExchangeRequest(words=words, signature=self._authority.sign(exchange_words(words)))
