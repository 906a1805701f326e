"""`covey.v1.Coordinator` over gRPC: hands out the experiment, and shows the swarm."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from grpc import StatusCode, aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from coordinator.link import bracketed
from coordinator.ports import port_taken
from proto import coordinator_pb2, coordinator_pb2_grpc
from proto.coordinator_pb2 import EnrolReply, EnrolRequest, WatchRequest
from proto.swarm_pb2 import SwarmSnapshot

Context = aio.ServicerContext[Any, Any]

SERVICE = coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"].full_name
SHORTEST_INTERVAL, LONGEST_INTERVAL = 0.2, 3600.0  # seconds between two snapshots
OPTIONS = (
    ("grpc.so_reuseport", 0),  # or a second coordinator would silently share the port
    ("grpc.max_receive_message_length", 64 * 1024),  # requests are short
    ("grpc.max_metadata_size", 16 * 1024),
)


class CoordinatorService(coordinator_pb2_grpc.CoordinatorServicer):
    """Gives `enrolment` to volunteers of version `version`, and `snapshot()` to those who watch."""

    def __init__(self, enrolment: EnrolReply, version: str, snapshot: Callable[[], SwarmSnapshot]) -> None:
        self.enrolment, self.version, self.snapshot = enrolment, version, snapshot

    async def Enrol(self, request: EnrolRequest, context: Context) -> EnrolReply:
        """NOT_FOUND: another run. FAILED_PRECONDITION: another version. INVALID_ARGUMENT: a bad name."""
        if request.run_id != self.enrolment.run_id:
            await context.abort(
                StatusCode.NOT_FOUND, f"experiment {request.run_id[:64]!r} is not run here; expected "
                f"{self.enrolment.run_id}. The link is stale: ask the operator for a new one.")
        if _compatible(request.version) != _compatible(self.version):
            await context.abort(
                StatusCode.FAILED_PRECONDITION, f"covey {request.version[:64]!r} can't join; expected "
                f"{'.'.join(_compatible(self.version))}. Install that version.")
        if not 1 <= len(request.name) <= 64 or not request.name.isprintable():
            await context.abort(
                StatusCode.INVALID_ARGUMENT, f"name {request.name[:64]!r}; expected 1 to 64 printable "
                "characters. Choose another with --name.")
        return self.enrolment

    async def Watch(self, request: WatchRequest, context: Context) -> AsyncIterator[SwarmSnapshot]:
        """INVALID_ARGUMENT: an interval that is neither 0 nor within the limits."""
        interval = request.interval_seconds
        if interval != 0 and not SHORTEST_INTERVAL <= interval <= LONGEST_INTERVAL:
            await context.abort(
                StatusCode.INVALID_ARGUMENT, f"interval_seconds = {interval:g}; expected 0, or "
                f"{SHORTEST_INTERVAL:g} to {LONGEST_INTERVAL:g}. Change it.")
        yield self.snapshot()
        while interval:
            await asyncio.sleep(interval)
            yield self.snapshot()


def bind_grpc(host: str, port: int) -> tuple[aio.Server, int]:
    """A server that has its port (0: any free one) but does not serve yet, and that port. Raises BadInput."""
    server = aio.server(options=OPTIONS, maximum_concurrent_rpcs=1024)
    try:
        return server, server.add_insecure_port(f"{bracketed(host)}:{port}")
    except RuntimeError:
        raise port_taken(host, port, "gRPC", "in use") from None


async def start_grpc(server: aio.Server, service: CoordinatorService) -> None:
    """Start serving `service`, the health service and reflection."""
    checks = health.aio.HealthServicer()  # type: ignore[attr-defined]  # missing in grpc-stubs
    await checks.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    coordinator_pb2_grpc.add_CoordinatorServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    await server.start()


def _compatible(version: str) -> tuple[str, ...]:
    # major.minor: patches don't change what peers agree on
    return tuple(version.split(".")[:2])
