"""The local control service: `covey.v1.Peer` on a unix socket that only its owner can open."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from averaging.runtime import runtime_path
from coordinator.local_server import serve_locally
from peer.supervisor import Supervisor
from proto.peer_pb2 import LeaveReply, LeaveRequest, PeerStatus, PeerWatchRequest, StatusRequest
from proto.peer_pb2_grpc import PeerServicer, add_PeerServicer_to_server

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]


def socket_path(state_dir: Path) -> Path:
    """Where the peer of `state_dir` answers."""
    return runtime_path(state_dir, ".sock")


class PeerService(PeerServicer):
    """Answers from the supervisor's status; Leave sets its `leave`."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    async def Status(self, request: StatusRequest, context: "Context") -> PeerStatus:
        """The peer now."""
        return self._supervisor.status

    async def Watch(self, request: PeerWatchRequest, context: "Context") -> AsyncIterator[PeerStatus]:
        """The peer now and at every interval until it is gone, its last status included."""
        while not self._supervisor.gone.is_set():
            yield self._supervisor.status
            try:
                await asyncio.wait_for(self._supervisor.gone.wait(), max(request.interval_seconds, 0.2))
            except TimeoutError:
                continue
        yield self._supervisor.status

    async def Leave(self, request: LeaveRequest, context: "Context") -> LeaveReply:
        """Leaves in good order; answers when the worker is gone."""
        self._supervisor.leave.set()
        await self._supervisor.gone.wait()
        return LeaveReply(last=self._supervisor.status)


@asynccontextmanager
async def serve_control(supervisor: Supervisor, path: Path) -> AsyncIterator[None]:
    """Serve on the socket `path` meanwhile. The caller holds the state directory that it stands for."""
    server = grpc.aio.server()
    add_PeerServicer_to_server(PeerService(supervisor), server)
    healthy = health.aio.HealthServicer()  # type: ignore[attr-defined]  # missing in its stubs
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    for service in ("", "covey.v1.Peer"):
        await healthy.set(service, health_pb2.HealthCheckResponse.SERVING)
    async with serve_locally(server, path):
        yield
