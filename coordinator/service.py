"""`covey.v1.Coordinator` over gRPC: lets volunteers in, hands out the experiment, and shows the swarm."""

import asyncio
import logging
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

from google.protobuf.message import DecodeError
from grpc import StatusCode, aio, ssl_server_credentials
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from coordinator.authority import Authority, Denied
from coordinator.credit_ledger import Leaderboard
from coordinator.crediting import contribution
from coordinator.limits import Limit, address_of
from coordinator.link import bracketed
from coordinator.ports import port_taken
from coordinator.tls import Certificate
from proto import coordinator_pb2, coordinator_pb2_grpc
from proto.coordinator_pb2 import CreditsRequest, EnrolReply, EnrolRequest, SignedContribution, WatchRequest
from proto.swarm_pb2 import SwarmSnapshot

Context = aio.ServicerContext[Any, Any]

SERVICE = coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"].full_name
SHORTEST_INTERVAL, LONGEST_INTERVAL = 0.2, 3600.0  # seconds between two snapshots
ENROLMENTS = 5.0, 100 # of one address: per second, and at once
QUESTIONS = 5.0, 100   # likewise of credits; to sign an answer takes a millisecond
WATCHERS = 64         # of one address at a time
OPTIONS = (
    ("grpc.so_reuseport", 0),  # or a second coordinator would silently share the port
    ("grpc.max_receive_message_length", 64 * 1024),  # requests are short
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.server_handshake_timeout_ms", 10_000),
)
CODES = {"banned": StatusCode.PERMISSION_DENIED, "invite": StatusCode.PERMISSION_DENIED,
         "clock": StatusCode.FAILED_PRECONDITION, "key": StatusCode.INVALID_ARGUMENT,
         "signature": StatusCode.UNAUTHENTICATED}  # by the reason of a Denied
log = logging.getLogger("covey.coordinator")


class CoordinatorService(coordinator_pb2_grpc.CoordinatorServicer):
    """Lets volunteers of version `version` in by `authority`, and shows `snapshot()` to those who watch.
    `leaderboard()`: who is credited with what.

    `offer()` is what all who are let in get: the experiment, and where the swarm is now.
    """

    def __init__(self, authority: Authority, offer: Callable[[], EnrolReply], version: str,
                 snapshot: Callable[[], SwarmSnapshot], leaderboard: Callable[[], Leaderboard] = Leaderboard) -> None:
        self.authority, self.offer, self.version, self.snapshot = authority, offer, version, snapshot
        self.leaderboard = leaderboard
        self._enrolments, self._questions, self._watchers = Limit(*ENROLMENTS), Limit(*QUESTIONS), Counter[str]()

    async def Enrol(self, request: EnrolRequest, context: Context) -> EnrolReply:
        """NOT_FOUND: another run. FAILED_PRECONDITION: another version, or a wrong clock. INVALID_ARGUMENT: a bad name
        or key. UNAUTHENTICATED: not signed. PERMISSION_DENIED: no good invite, or banned. RESOURCE_EXHAUSTED: too
        often."""
        if not self._enrolments.allows(address_of(context.peer())):
            self.authority.failures["rate"] += 1
            await context.abort(StatusCode.RESOURCE_EXHAUSTED, "too many enrolments from one address; expected "
                                f"{ENROLMENTS[0]:g} a second. Try again in a minute.")
        offer = self.offer()
        if request.run_id != offer.run_id:
            await context.abort(
                StatusCode.NOT_FOUND, f"experiment {request.run_id[:64]!r} is not run here; expected "
                f"{offer.run_id}. The link is stale: ask the operator for a new one.")
        if compatible(request.version) != compatible(self.version):
            await context.abort(
                StatusCode.FAILED_PRECONDITION, f"covey {request.version[:64]!r} can't join; expected "
                f"{'.'.join(compatible(self.version))}. Install that version.")
        if not 1 <= len(request.name) <= 64 or not request.name.isprintable():
            await context.abort(
                StatusCode.INVALID_ARGUMENT, f"name {request.name[:64]!r}; expected 1 to 64 printable "
                "characters. Choose another with --name.")
        try:
            grant = await asyncio.to_thread(self.authority.enrol, request)
        except Denied as denied:
            await context.abort(CODES[denied.reason], str(denied))
        except sqlite3.Error as error:
            log.error("a volunteer could not be enrolled: %s", error)
            await context.abort(StatusCode.UNAVAILABLE, "the coordinator can't write its ledger; expected one that can."
                                " Try again later, or tell the operator.")
        offer.name, offer.token, offer.token_expires = grant.name, grant.token, grant.expires
        return offer

    async def Credits(self, request: CreditsRequest, context: Context) -> SignedContribution:
        """NOT_FOUND: nobody has enrolled with that peer id. RESOURCE_EXHAUSTED: too often."""
        if not self._questions.allows(address_of(context.peer())):
            self.authority.failures["rate"] += 1
            await context.abort(StatusCode.RESOURCE_EXHAUSTED, "too many questions from one address; expected "
                                f"{QUESTIONS[0]:g} a second. Try again in a minute.")
        member = await asyncio.to_thread(self.authority.ledger.find_member, request.peer_id)
        if member is None or member.peer_id != request.peer_id:
            await context.abort(StatusCode.NOT_FOUND, f"peer id {request.peer_id[:64]!r}; expected a member's. Join "
                                "first.")
        told = contribution(self.leaderboard(), member.peer_id, member.name, self.authority.run_id,
                            time.time()).SerializeToString()
        return SignedContribution(contribution=told, signature=await asyncio.to_thread(
            self.authority.sign_contribution, told))

    async def Watch(self, request: WatchRequest, context: Context) -> AsyncIterator[SwarmSnapshot]:
        """INVALID_ARGUMENT: an interval that is neither 0 nor within the limits. RESOURCE_EXHAUSTED: too many."""
        interval, caller = request.interval_seconds, address_of(context.peer())
        if interval != 0 and not SHORTEST_INTERVAL <= interval <= LONGEST_INTERVAL:
            await context.abort(
                StatusCode.INVALID_ARGUMENT, f"interval_seconds = {interval:g}; expected 0, or "
                f"{SHORTEST_INTERVAL:g} to {LONGEST_INTERVAL:g}. Change it.")
        if self._watchers[caller] >= WATCHERS:
            await context.abort(StatusCode.RESOURCE_EXHAUSTED, f"{WATCHERS} watch from one address already; expected "
                                "fewer. Stop one.")
        self._watchers[caller] += 1
        try:
            yield self.snapshot()
            while interval:
                await asyncio.sleep(interval)
                yield self.snapshot()
        finally:
            self._watchers -= Counter([caller])  # nothing stays of those who have none


def bind_grpc(host: str, port: int, certificate: Certificate) -> tuple[aio.Server, int]:
    """A server that has its port (0: any free one) but does not serve yet, and that port. Raises BadInput."""
    server = aio.server(options=OPTIONS, maximum_concurrent_rpcs=1024)
    credentials = ssl_server_credentials([(certificate.key, certificate.chain)])
    try:
        return server, server.add_secure_port(f"{bracketed(host)}:{port}", credentials)
    except RuntimeError:
        raise port_taken(host, port, "gRPC", "in use") from None


async def start_grpc(server: aio.Server, service: CoordinatorService) -> None:
    """Start serving `service`, the health service and reflection."""
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_ours)
    checks = health.aio.HealthServicer()  # type: ignore[attr-defined]  # missing in grpc-stubs
    await checks.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    coordinator_pb2_grpc.add_CoordinatorServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    await server.start()


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether a line of gRPC's log is worth the operator's eye: a stranger's malformed message, traceback and all,
    would let it fill the disk."""
    return not (record.exc_info and isinstance(record.exc_info[1], DecodeError))


def compatible(version: str) -> tuple[str, ...]:
    """Major and minor: patches don't change what peers agree on."""
    return tuple(version.split(".")[:2])
