"""Server-sent events: every viewer of the page gets each newest snapshot, serialised once for all of them."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

MOST_VIEWERS = 100  # of the 256 connections that serve_http takes; the rest are for /metrics and the JSON
RETRY_MILLISECONDS = 1000  # after which a browser calls again
NO_STORE = {"Cache-Control": "no-store", "Content-Security-Policy": "default-src 'none'"}


class Feed:
    """The newest snapshot, and who follows it.

    Nothing is queued: whoever is slow gets the newest when it can take one, and misses those between. Who takes
    nothing at all is dropped by serve_http's limit on unacknowledged data.
    """

    def __init__(self, swarm: Mapping[str, Any]) -> None:
        self.viewers = 0
        self._number, self._open, self._news = 0, True, asyncio.Event()
        self.publish(swarm)

    def publish(self, swarm: Mapping[str, Any]) -> None:
        """Make `swarm` the newest snapshot."""
        self._number += 1
        self._message = f"id: {self._number}\ndata: {json.dumps(swarm, allow_nan=False)}\n\n".encode()
        self._wake()

    def close(self) -> None:
        """End all streams; later ones end after their first snapshot."""
        self._open = False
        self._wake()

    async def follow(self) -> AsyncIterator[bytes]:
        """The newest snapshot at once, then whenever there is another, until the feed is closed."""
        yield f"retry: {RETRY_MILLISECONDS}\n\n".encode()
        while True:
            still_open, news = self._open, self._news  # before the message is sent: that may take a while
            yield self._message
            if not still_open:
                return
            await news.wait()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


class EventStream(StreamingResponse):
    """A response that follows `feed`, counted among its viewers while it lasts."""

    def __init__(self, feed: Feed) -> None:
        headers = {**NO_STORE, "X-Accel-Buffering": "no"}  # else nginx before us would keep events back
        super().__init__(feed.follow(), headers=headers, media_type="text/event-stream")
        self.feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.feed.viewers += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.feed.viewers -= 1


async def events(feed: Feed, request: Request) -> Response:
    """A route's endpoint: the stream, or 503 and a line while there are as many viewers as we serve."""
    if feed.viewers >= MOST_VIEWERS:
        return PlainTextResponse(f"{MOST_VIEWERS} viewers follow live already; read /api/swarm, or come back later\n",
                                 status_code=503, headers={**NO_STORE, "Retry-After": "10"})
    if request.method == "HEAD":  # who asks for no body would wait for ever for its end
        return Response(headers=NO_STORE, media_type="text/event-stream")
    return EventStream(feed)
