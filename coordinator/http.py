"""HTTP: serving an application within this process's event loop, and the coordinator's own application."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext

import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from coordinator.page import CONTENT_SECURITY_POLICY, render
from coordinator.ports import listen
from coordinator.swarm import SwarmState
from coordinator.view import About, is_fresh, view

Endpoint = Callable[[Request], Awaitable[Response]]
HEADERS = [("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"), ("Cache-Control", "no-store"),
           ("Content-Security-Policy", CONTENT_SECURITY_POLICY)]


def coordinator_app(state: Callable[[], SwarmState], about: About, registry: CollectorRegistry,
                    clock: Callable[[], float] = time.time) -> ASGIApp:
    """`/` a page, `/api/swarm` the same as JSON, `/metrics`, `/healthz`; read-only. `clock` gives Unix seconds."""

    async def page(request: Request) -> Response:
        return HTMLResponse(render(view(state(), about), about, is_fresh(state(), clock())))

    async def swarm(request: Request) -> Response:
        return JSONResponse({**view(state(), about), "link": about.link, "fresh": is_fresh(state(), clock())})

    async def healthz(request: Request) -> Response:
        if is_fresh(state(), clock()):
            return PlainTextResponse("ok\n")
        return PlainTextResponse("the DHT could not be read lately\n", status_code=503)

    return Starlette(routes=[Route("/", page), Route("/api/swarm", swarm), Route("/healthz", healthz),
                             Route("/metrics", metrics_endpoint(registry))])


def metrics_endpoint(registry: CollectorRegistry) -> Endpoint:
    """A route's endpoint that answers a Prometheus scrape of `registry`, in the format that it asks for."""

    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"Content-Type": content_type})

    return metrics


@asynccontextmanager
async def serve_http(app: ASGIApp, host: str, port: int) -> AsyncIterator[int]:
    """Serve `app` at `host`:`port` (0: any free port) in the running loop; yields the port.

    Raises BadInput if the port can't be had. Open requests get a second to end.
    """
    listener = listen(host, port, "HTTP")
    server = _Server(uvicorn.Config(
        app, log_config=None, log_level="warning", access_log=False, lifespan="off", ws="none", headers=HEADERS,
        server_header=False, limit_concurrency=256, timeout_graceful_shutdown=1))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await serving


class _Server(uvicorn.Server):
    """uvicorn within a process that has signal handlers of its own."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()
