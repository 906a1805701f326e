"""HTTP: serving an application within this process's event loop, and the coordinator's own application."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext

import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from coordinator.connections import Connection
from coordinator.events import NO_STORE, Feed, events
from coordinator.history import History, columns
from coordinator.page.assets import answer, asset, content_security_policy, document, static_files
from coordinator.ports import listen
from coordinator.view import About, Seen, is_fresh, swarm_json

Endpoint = Callable[[Request], Awaitable[Response]]
HEADERS = [("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer")]
UNACKNOWLEDGED_SECONDS = 20  # that a client may take nothing of what was sent to it, before it counts as gone


def coordinator_app(seen: Callable[[], Seen], about: About, registry: CollectorRegistry, *,
                    history: Callable[[], History], feed: Feed, clock: Callable[[], float] = time.time) -> ASGIApp:
    """The page and what it reads, `/metrics` and `/healthz`; read-only. `clock` gives Unix seconds."""

    known: tuple[object, ...] = ()
    made = asset(b"", "")

    async def swarm(request: Request) -> Response:
        nonlocal known, made
        if known != (newest := (now := seen(), is_fresh(now.state, clock()))):
            body = json.dumps(swarm_json(now, about, clock()), allow_nan=False)
            known, made = newest, asset(body.encode(), "application/json")
        return answer(request, made, NO_STORE)

    async def healthz(request: Request) -> Response:
        if is_fresh(seen().state, clock()):
            return PlainTextResponse("ok\n", headers=NO_STORE)
        return PlainTextResponse("the DHT could not be read lately\n", status_code=503, headers=NO_STORE)

    async def live(request: Request) -> Response:
        return await events(feed, request)

    return Starlette(routes=[
        *_page(about), Route("/api/swarm", swarm), Route("/api/events", live),
        Route("/api/history", _history(history)), Route("/healthz", healthz),
        Route("/metrics", metrics_endpoint(registry))])


def metrics_endpoint(registry: CollectorRegistry) -> Endpoint:
    """A route's endpoint that answers a Prometheus scrape of `registry`, in the format that it asks for."""

    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={**NO_STORE, "Content-Type": content_type})

    return metrics


def _page(about: About) -> list[Route]:
    page, static = document(about), static_files()

    async def index(request: Request) -> Response:
        return answer(request, page, {"Content-Security-Policy": content_security_policy()})

    async def part(request: Request) -> Response:
        if (found := static.get(request.path_params["name"])) is None:
            raise HTTPException(404)
        return answer(request, found)

    return [Route("/", index), Route("/static/{name}", part)]


def _history(history: Callable[[], History]) -> Endpoint:
    newest, made = History(), asset(b"", "")

    async def endpoint(request: Request) -> Response:
        nonlocal newest, made
        if not made.body or newest is not history():
            newest = history()
            made = asset(json.dumps(columns(newest), allow_nan=False).encode(), "application/json")
        return answer(request, made, {"Content-Security-Policy": "default-src 'none'"})

    return endpoint


@asynccontextmanager
async def serve_http(app: ASGIApp, host: str, port: int) -> AsyncIterator[int]:
    """Serve `app` at `host`:`port` (0: any free port) in the running loop; yields the port.

    Raises BadInput if the port can't be had. Open requests get a second to end.
    """
    listener = listen(host, port, "HTTP")
    # Connections inherit it. Without it, a client that reads nothing would hold its place for ever.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_SECONDS * 1000)
    server = _Server(uvicorn.Config(
        app, log_config=None, log_level="error", access_log=False,  # who sends garbage can't fill the log with warnings
        lifespan="off", ws="none", headers=HEADERS, server_header=False, limit_concurrency=512, http=Connection,
        timeout_graceful_shutdown=1))
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
