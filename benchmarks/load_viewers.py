"""Page viewers and Prometheus for `benchmarks.coordinator_load`: what they are sent, and how long a scrape takes."""

import asyncio
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import httpx

from coordinator.page.assets import static_files

PAGE = ("/", *(f"/static/{name}" for name in static_files()), "/api/history")
SCRAPE_SECONDS, HISTORY_SECONDS = 15.0, 10.0  # of Prometheus by default, and of the page
LIMITS = httpx.Limits(keepalive_expiry=2)  # httpx fails where the server is just closing a connection


@dataclass
class Viewer:
    """Somebody with the page open: `swarm` is what it shows, `loaded` the bytes of its first load."""

    address: str  # of loopback's; from one address a coordinator takes 128 connections
    swarm: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)
    events: int = 0
    received: int = 0  # bytes of events, as sent
    loaded: int = 0

    async def watch(self, url: str) -> None:
        """As a browser does, until cancelled."""
        transport = httpx.AsyncHTTPTransport(local_address=self.address, limits=LIMITS, verify=False)
        async with httpx.AsyncClient(base_url=url, timeout=None, transport=transport,
                                     headers={"accept-encoding": "gzip"}) as client:
            for path in PAGE:
                self.loaded += await _size(client, path)
            history = asyncio.create_task(self._read_history(client))
            try:
                async with client.stream("GET", "/api/events") as answer:
                    answer.raise_for_status()
                    await self._follow(answer)
            finally:
                history.cancel()

    async def _follow(self, answer: httpx.Response) -> None:
        unpack, text = zlib.decompressobj(16 + zlib.MAX_WBITS), b""
        async for chunk in answer.aiter_raw():
            self.received += len(chunk)
            *whole, text = (text + unpack.decompress(chunk)).split(b"\n\n")
            for event in whole:
                for line in event.splitlines():
                    if line.startswith(b"data: "):
                        self._show(json.loads(line.removeprefix(b"data: ")))

    def _show(self, event: Mapping[str, Any]) -> None:
        """As coordinator/page/live.js does."""
        for peer in list(self.rows) if "peers" in event else event["gone"]:
            self.rows.pop(peer, None)
        self.rows |= {row["peer_id"]: row for row in event.get("peers", event.get("changed", ()))}
        self.swarm, self.events = dict(event), self.events + 1

    async def _read_history(self, client: httpx.AsyncClient) -> None:
        while True:
            await asyncio.sleep(HISTORY_SECONDS)
            await _size(client, "/api/history")


async def _size(client: httpx.AsyncClient, path: str) -> int:
    async with client.stream("GET", path) as answer:
        answer.raise_for_status()
        return sum([len(chunk) async for chunk in answer.aiter_raw()])


async def scrape(url: str, seconds: list[float]) -> None:
    """As Prometheus does, until cancelled; `seconds` gets what each took."""
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=LIMITS) as client:
        while True:
            began = monotonic()
            (await client.get("/metrics", headers={"accept": "application/openmetrics-text"})).raise_for_status()
            seconds.append(monotonic() - began)
            await asyncio.sleep(max(0.0, SCRAPE_SECONDS - seconds[-1]))
