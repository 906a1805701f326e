"""`covey.v1.Replica`: what this coordinator hands to others of its run."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from grpc import StatusCode, aio

from averaging.identity import is_signed
from averaging.membership import exchange_words
from coordinator.admin import admit
from coordinator.authority import CLOCK_SECONDS, Authority
from coordinator.facts import CoordinatorFact, Facts, by_key
from coordinator.limits import Limit, address_of
from coordinator.link import Link, parse_link
from coordinator.service import compatible
from coordinator.wire import decode_fact, digest, encode
from proto.replica_pb2 import (
    ExchangeReply,
    ExchangeRequest,
    ExchangeWords,
    HandoverReply,
    HandoverRequest,
)
from proto.replica_pb2_grpc import ReplicaServicer
from training.errors import BadInput

Context = aio.ServicerContext[Any, Any]
CALLS = 5.0, 50           # of one address: per second, and at once
LATELY_SECONDS = 7 * 86400.0  # a coordinator that was not heard of since then is named to nobody
MOST = 8                  # coordinators of one run
log = logging.getLogger("covey.coordinator")


@dataclass(frozen=True)
class Own:
    """This coordinator, as the others are to know it. `link`: without an invite; `addresses`: of its DHT node."""

    peer_id: str
    link: Link
    addresses: list[str]

    def fact(self, now: float) -> CoordinatorFact:
        """For the others, at `now`."""
        return CoordinatorFact(self.peer_id, now, str(self.link), " ".join(self.addresses))


def others(known: Facts, own: Own) -> list[CoordinatorFact]:
    """The other coordinators, the one heard of last first; of those that were at one address, the newest only."""
    newest = {own.link.address: own.fact(0.0)}
    for fact in sorted(known.coordinators.values(), key=lambda fact: fact.time, reverse=True):
        with suppress(BadInput):  # of a later version
            if fact.peer_id != own.peer_id:
                newest.setdefault(parse_link(fact.link).address, fact)
    return list(newest.values())[1:MOST]


def heard_lately(found: Iterable[CoordinatorFact], now: float) -> list[CoordinatorFact]:
    """Those that are worth being told to others."""
    return [fact for fact in found if now - fact.time < LATELY_SECONDS]


class ReplicaService(ReplicaServicer):
    """Hands what `authority` knows to other coordinators, and all that one needs to who has the admin `token`.

    `initial_peers()`: multiaddresses to enter the DHT by.
    """

    def __init__(self, authority: Authority, own: Own, *, document: bytes, folder: Path, token: str, version: str,
                 initial_peers: Callable[[], Iterable[str]]) -> None:
        self._authority, self._own, self._document, self._folder = authority, own, document, folder
        self._token, self._version, self._initial_peers = token, version, initial_peers
        self._limit = Limit(*CALLS)

    async def Handover(self, request: HandoverRequest, context: Context) -> HandoverReply:
        """UNAUTHENTICATED: not with the admin token. NOT_FOUND: another run. FAILED_PRECONDITION: another version."""
        await self._admit(context)
        await admit(context, self._token, self._authority.failures)
        if request.run_id != self._own.link.run_id:
            await context.abort(StatusCode.NOT_FOUND, f"experiment {request.run_id[:64]!r} is not run here; expected "
                                f"{self._own.link.run_id}. Copy the link that this coordinator printed.")
        if compatible(request.version) != compatible(self._version):
            await context.abort(StatusCode.FAILED_PRECONDITION, f"covey {request.version[:64]!r} can't take over; "
                                f"expected {'.'.join(compatible(self._version))}. Install that version.")
        known = await asyncio.to_thread(self._authority.ledger.facts)
        credited = await asyncio.to_thread(self._authority.credits.copy)
        log.warning("a copy of the authority's key and of the ledger was handed to %s", address_of(context.peer()))
        return HandoverReply(experiment=self._document, authority_key=(self._folder / "authority.key").read_bytes(),
                             facts=encode(known), bans=self._authority.ban_file.newest().signed,
                             initial_peers=self._initial_peers(), admin_token=self._token, credits=credited)

    async def Exchange(self, request: ExchangeRequest, context: Context) -> ExchangeReply:
        """UNAUTHENTICATED: the authority's key has not signed this, just now, for this coordinator."""
        await self._admit(context)
        words = self._read(request)
        if words is None:
            self._authority.failures["replica"] += 1
            await context.abort(StatusCode.UNAUTHENTICATED, "no coordinator of this run; expected the signature of its "
                                "authority, for this certificate. Start it by `covey coordinator --join`.")
        if not abs(off := time.time() - words.time) <= CLOCK_SECONDS:
            await context.abort(StatusCode.FAILED_PRECONDITION, f"a clock that is {abs(off):.0f} s off; expected at "
                                f"most {CLOCK_SECONDS:.0f} s. Set both machines' clocks.")
        caller = decode_fact(CoordinatorFact, words.caller)
        return await asyncio.to_thread(self._answer, caller, words.known)

    def _answer(self, caller: CoordinatorFact, known: bytes) -> ExchangeReply:
        self._authority.ledger.learn(Facts(coordinators=by_key([caller])))
        ours = encode(self._authority.ledger.facts())
        return ExchangeReply(facts=None if digest(ours) == known else ours,
                             bans=self._authority.ban_file.newest().signed)

    def _read(self, request: ExchangeRequest) -> ExchangeWords | None:
        if not is_signed(self._authority.public_key, exchange_words(request.words), request.signature):
            return None
        try:
            words = ExchangeWords.FromString(request.words)
        except DecodeError:
            return None
        ours = (self._own.link.run_id, self._own.link.certificate)
        return words if (words.run_id, words.callee) == ours else None

    async def _admit(self, context: Context) -> None:
        if not self._limit.allows(address_of(context.peer())):
            self._authority.failures["rate"] += 1
            await context.abort(StatusCode.RESOURCE_EXHAUSTED, "too many calls from one address; expected "
                                f"{CALLS[0]:g} a second. Try again in a minute.")
