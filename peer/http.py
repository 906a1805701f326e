"""A peer's HTTP application: `/metrics` and `/healthz`, for this machine."""

from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from coordinator.http import metrics_endpoint
from proto.peer_pb2 import PeerStatus


def peer_app(status: PeerStatus, registry: CollectorRegistry) -> ASGIApp:
    """`status` is the supervisor's own, always current. Healthy is what starts, trains or leaves."""

    async def healthz(request: Request) -> Response:
        return PlainTextResponse(f"{status.state}\n", 503 if status.state == "restarting" else 200)

    return Starlette(routes=[Route("/healthz", healthz), Route("/metrics", metrics_endpoint(registry))])
