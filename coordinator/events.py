"""Server-sent events: every viewer of the page gets each newest reading, encoded and compressed once for all of them.

Who has the reading before gets the figures and the rows that changed; who has not, the figures and all rows. Rows are
bounded: of a larger swarm the first by name, as the page shows them; /api/swarm has all. A row says when its peer was
heard, not how long ago that was, so that it stays the same while its peer is silent.
"""

import asyncio
import json
import zlib
from collections.abc import AsyncIterator, Mapping
from functools import cached_property
from struct import pack
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

MOST_VIEWERS = 100  # of the 256 connections that serve_http takes; the rest are for /metrics and the JSON
MOST_ROWS = 300  # as many as the page shows
RETRY_MILLISECONDS = 1000  # after which a browser calls again
NO_STORE = {"Cache-Control": "no-store", "Content-Security-Policy": "default-src 'none'"}
GZIP_START, DEFLATE_END = b"\x1f\x8b\x08" + bytes(6) + b"\xff", b"\x03\x00"


class Part:
    """Some bytes, and the same as a piece of a deflate stream: it can follow any other piece."""

    def __init__(self, plain: bytes) -> None:
        self.plain = plain

    @cached_property
    def zipped(self) -> bytes:
        """Made once, and only if somebody takes it."""
        packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        return packer.compress(self.plain) + packer.flush(zlib.Z_FULL_FLUSH)


class Reading:
    """One reading of the swarm (coordinator.view.swarm_json), as it is sent; `rows` are those of the one before."""

    def __init__(self, number: int, swarm: Mapping[str, Any], rows: Mapping[str, Any]) -> None:
        self.number, self.rows = number, _rows(swarm)
        self._figures = {name: value for name, value in swarm.items() if name != "peers"}
        self._changed = [row for peer, row in self.rows.items() if rows.get(peer) != row]
        self._gone = [peer for peer in rows if peer not in self.rows]

    @cached_property
    def whole(self) -> Part:
        """For newcomers."""
        return self._part({"peers": list(self.rows.values())})

    @cached_property
    def change(self) -> Part:
        """For who has the one before."""
        return self._part({"changed": self._changed, "gone": self._gone})

    def _part(self, rows: Mapping[str, Any]) -> Part:
        return Part(f"id: {self.number}\ndata: {json.dumps({**self._figures, **rows}, allow_nan=False)}\n\n".encode())


def _rows(swarm: Mapping[str, Any]) -> dict[str, Any]:
    first = sorted(swarm.get("peers", ()), key=lambda row: (row["name"], row["peer_id"]))[:MOST_ROWS]
    return {row["peer_id"]: {name: value for name, value in row.items() if name != "last_seen_seconds"} | {
        "heard_seconds": round(swarm["time_seconds"] - row["last_seen_seconds"], 3)} for row in first}


class Feed:
    """The newest reading, and who follows it.

    Nothing is queued: whoever is slow gets the newest when it can take one, and misses those between. Who takes
    nothing at all is dropped by serve_http's limit on unacknowledged data.
    """

    def __init__(self, swarm: Mapping[str, Any]) -> None:
        self.viewers = 0
        self._newest, self._open, self._news = Reading(1, swarm, {}), True, asyncio.Event()

    def publish(self, swarm: Mapping[str, Any]) -> None:
        """Make `swarm` the newest reading."""
        self._newest = Reading(self._newest.number + 1, swarm, self._newest.rows)
        self._wake()

    def close(self) -> None:
        """End all streams; later ones end after their first reading."""
        self._open = False
        self._wake()

    async def follow(self) -> AsyncIterator[Part]:
        """The newest reading at once, then whenever there is another, until the feed is closed."""
        yield Part(f"retry: {RETRY_MILLISECONDS}\n\n".encode())
        sent = 0
        while True:
            still_open, news, newest = self._open, self._news, self._newest  # sending may take a while
            yield newest.change if sent == newest.number - 1 and sent else newest.whole
            sent = newest.number
            if not still_open:
                return
            await news.wait()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


async def plain(parts: AsyncIterator[Part]) -> AsyncIterator[bytes]:
    """The parts as they are."""
    async for part in parts:
        yield part.plain


async def gzipped(parts: AsyncIterator[Part]) -> AsyncIterator[bytes]:
    """The parts as one gzip file; what is done for each viewer is no more than its checksum."""
    checksum = size = 0
    yield GZIP_START
    async for part in parts:
        checksum, size = zlib.crc32(part.plain, checksum), size + len(part.plain)
        yield part.zipped
    yield DEFLATE_END + pack("<LL", checksum, size & 0xFFFFFFFF)


class EventStream(StreamingResponse):
    """A response that follows `feed`, counted among its viewers while it lasts."""

    def __init__(self, feed: Feed, *, zipped: bool) -> None:
        headers = {**NO_STORE, "X-Accel-Buffering": "no", "Vary": "Accept-Encoding",  # nginx before us must not wait
                   **({"Content-Encoding": "gzip"} if zipped else {})}
        super().__init__((gzipped if zipped else plain)(feed.follow()), headers=headers,
                         media_type="text/event-stream")
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
    return EventStream(feed, zipped="gzip" in request.headers.get("accept-encoding", ""))
