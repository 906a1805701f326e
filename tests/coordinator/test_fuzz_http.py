"""HTTP that no browser speaks, ten thousand times, and clients that hold on to what they have."""

import asyncio
import gc
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import httpx
import psutil
import pytest
from starlette.types import ASGIApp

from coordinator import connections
from coordinator.events import Feed
from coordinator.history import History, remember
from coordinator.http import coordinator_app, serve_http
from coordinator.metrics import coordinator_registry
from coordinator.swarm import SwarmState
from coordinator.view import About, Seen

REQUESTS = 10_000
AT_ONCE = 50
GROWTH = 32 << 20  # bytes
PATHS = ["/", "/api/swarm", "/api/history", "/metrics", "/healthz", "/static/page.js", "/../../etc/passwd",
         "/static/../coordinator.py", "/%2e%2e/%00", "/" + "a" * 70_000, "*", "http://elsewhere/", "/?" + "x=1&" * 500,
         ""]
METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "\x00", "G E T", "PRI"]
HEADERS = ["Host: x", "Host: " + "y" * 9000, "Content-Length: -1", "Content-Length: 99999999999999999999",
           "Transfer-Encoding: chunked", "Accept: " + "\xff" * 200, "Range: bytes=0-,1-", "Connection: close",
           "Accept-Encoding: br;q=nan", "If-None-Match: \"x\"", ": no name", "Expect: 100-continue",
           "Upgrade: websocket", "\x00\x01: \x02", "Cookie: " + "a=b; " * 300, "Accept: application/openmetrics-text"]


@pytest.fixture
def app(about: About, state: SwarmState, now: float) -> Callable[[], ASGIApp]:
    """Makes one, in the loop that is to run it."""
    return lambda: coordinator_app(
        lambda: Seen(state), about, coordinator_registry(lambda: Seen(state), about, lambda: now),
        history=lambda: remember(History(), state), feed=Feed({}), clock=lambda: now)


@asynccontextmanager
async def served(app: ASGIApp) -> AsyncIterator[int]:
    async with serve_http(app, "127.0.0.1", 0) as port:
        yield port


def drawn(draw: random.Random) -> bytes:
    if draw.random() < 0.15:
        return draw.randbytes(draw.randrange(1, 400))
    version = draw.choice(["HTTP/1.1"] * 5 + ["HTTP/1.0", "HTTP/9.9", "HTTP/2.0", ""])
    method = draw.choice(["GET"] * 6 + METHODS)
    lines = [f"{method} {draw.choice(PATHS)} {version}", *draw.sample(HEADERS, draw.randrange(5)), "", ""]
    text = draw.choice(["\r\n"] * 5 + ["\n", "\r"]).join(lines).encode("latin-1")
    return text[:draw.randrange(len(text) + 1)] if draw.random() < 0.2 else text + draw.randbytes(draw.randrange(20))


async def ask(port: int, request: bytes) -> str:
    """The status, having seen that nothing of the inside is told."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        with suppress(OSError):
            writer.write(request)
            writer.write_eof()  # so that what is no whole request is known to be none
        answer = b""
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(20):
                answer = await reader.read(1 << 16)
        assert b"Traceback" not in answer
        assert b"File \"" not in answer
        assert b"root:" not in answer
        return answer[9:12].decode("latin-1") if answer.startswith(b"HTTP/") else "none"
    finally:
        writer.close()


async def fuzz(port: int, draw: random.Random, requests: int) -> Counter[str]:
    seen = Counter[str]()
    for _ in range(requests // AT_ONCE):
        seen.update(await asyncio.gather(*(ask(port, drawn(draw)) for _ in range(AT_ONCE))))
    return seen


async def is_well(port: int) -> bool:
    async with httpx.AsyncClient() as client:
        return (await client.get(f"http://127.0.0.1:{port}/api/swarm", timeout=10)).status_code == 200


@pytest.mark.timeout(300)
def test_whatever_is_asked_is_answered_or_hung_up_on_and_costs_nothing(
        app: Callable[[], ASGIApp], caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> tuple[Counter[str], int]:
        async with served(app()) as port:
            await fuzz(port, random.Random(0), REQUESTS // 10)  # what has to be allocated once is
            gc.collect()
            before = psutil.Process().memory_info().rss
            seen = await fuzz(port, random.Random(1), REQUESTS)
            gc.collect()
            grown = psutil.Process().memory_info().rss - before
            assert await is_well(port)
            return seen, grown

    caplog.set_level(logging.WARNING)
    seen, grown = asyncio.run(work())
    print(dict(seen), f"{grown / (1 << 20):.1f} MiB")
    assert {"200", "400", "404", "405"} <= seen.keys()
    assert not {status for status in seen if status.startswith("5")}
    assert grown < GROWTH
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")]  # or anybody fills the disk


@pytest.mark.timeout(120)
def test_clients_that_never_finish_their_request_keep_nobody_out(
        app: Callable[[], ASGIApp], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 1.0)

    async def slow(port: int) -> bool:
        """Whether it is hung up on while it still dribbles."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        hung_up = asyncio.ensure_future(reader.read())
        with suppress(OSError):
            for letter in b"GET / HTTP/1.1\r\nHost: x\r\n" * 40:
                writer.write(bytes([letter]))
                await writer.drain()
                if (await asyncio.wait({hung_up}, timeout=0.2))[0]:
                    break
        writer.close()
        return hung_up.done()

    async def work() -> list[bool]:
        async with served(app()) as port:
            dribbling = [asyncio.create_task(slow(port)) for _ in range(connections.MOST - 8)]
            await asyncio.sleep(0)
            assert await is_well(port)
            return await asyncio.gather(*dribbling)

    assert all(asyncio.run(work()))


@pytest.mark.timeout(120)
def test_one_address_does_not_hold_all_connections(app: Callable[[], ASGIApp]) -> None:
    async def work() -> int:
        async with served(app()) as port:
            opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(connections.MOST + 20)]
            refused = 0
            for reader, _ in opened[connections.MOST:]:
                async with asyncio.timeout(5):
                    refused += await reader.read() == b""
            for _, writer in opened:
                writer.close()
            return refused

    assert asyncio.run(work()) == 20
