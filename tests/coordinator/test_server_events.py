"""Server-sent events by a real server on loopback: at once, then at every reading, and never more than can be sent."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

import coordinator.events
import coordinator.http
from coordinator.events import Feed
from coordinator.history import History
from coordinator.http import coordinator_app, serve_http
from coordinator.metrics import coordinator_registry
from coordinator.swarm import SwarmState
from coordinator.view import About, swarm_json

Serve = Callable[[Callable[[str, Feed], Awaitable[None]]], None]


@pytest.fixture
def serve(about: About, state: SwarmState, now: float) -> Serve:
    """`serve(check)`: await check(url, feed) beside a server."""

    async def run(check: Callable[[str, Feed], Awaitable[None]]) -> None:
        feed = Feed(swarm_json(state, about, now))
        app = coordinator_app(lambda: state, about, coordinator_registry(lambda: state, about), history=History,
                              feed=feed, clock=lambda: now)
        async with serve_http(app, "127.0.0.1", 0) as port, asyncio.timeout(30):
            try:
                await check(f"http://127.0.0.1:{port}", feed)
            finally:
                feed.close()

    return lambda check: asyncio.run(run(check))


@asynccontextmanager
async def following(url: str) -> AsyncIterator[AsyncIterator[tuple[int, Any]]]:
    """The events at `url` as (id, data)."""
    async with httpx.AsyncClient() as client, client.stream("GET", f"{url}/api/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.aiter_lines()

        async def parsed() -> AsyncIterator[tuple[int, Any]]:
            number = 0
            async for line in lines:
                field, _, value = line.partition(": ")
                if field == "id":
                    number = int(value)
                elif field == "data":
                    yield number, json.loads(value)

        yield parsed()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_the_first_event_comes_at_once_and_equals_the_json(serve: Serve) -> None:
    async def check(url: str, feed: Feed) -> None:
        async with following(url) as events, httpx.AsyncClient() as client:
            assert await anext(events) == (1, (await client.get(f"{url}/api/swarm")).json())

    serve(check)


def test_every_viewer_gets_each_new_reading_with_its_number(serve: Serve) -> None:
    async def check(url: str, feed: Feed) -> None:
        async with following(url) as ours, following(url) as theirs:
            assert [(await anext(events))[0] for events in (ours, theirs)] == [1, 1]
            for number in (2, 3):
                feed.publish({"epoch": number})
                assert [await anext(events) for events in (ours, theirs)] == [(number, {"epoch": number})] * 2

    serve(check)


def test_a_viewer_who_goes_is_not_served_any_longer(serve: Serve) -> None:
    async def check(url: str, feed: Feed) -> None:
        async with following(url) as events:
            await anext(events)
            assert feed.viewers == 1
        await until(lambda: feed.viewers == 0)

    serve(check)


def test_a_viewer_beyond_the_cap_is_told_so_and_the_json_still_answers(
        serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator.events, "MOST_VIEWERS", 1)

    async def check(url: str, feed: Feed) -> None:
        async with following(url) as events, httpx.AsyncClient() as client:
            await anext(events)
            refused = await client.get(f"{url}/api/events")
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
            assert refused.text == "1 viewers follow live already; read /api/swarm, or come back later\n"
            assert (await client.get(f"{url}/api/swarm")).status_code == 200
        await until(lambda: feed.viewers == 0)
        async with following(url) as events:
            await anext(events)

    serve(check)


async def stalled(url: str) -> asyncio.StreamWriter:
    """A viewer who asks for events, reads the answer's start, and then nothing."""
    small = socket.socket()
    small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    small.setblocking(False)
    host, _, port = url.removeprefix("http://").partition(":")
    await asyncio.get_running_loop().sock_connect(small, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=small, limit=1024)
    writer.write(b"GET /api/events HTTP/1.1\r\nHost: test\r\n\r\n")
    await reader.readline()
    return writer


def test_a_viewer_who_reads_nothing_is_dropped_and_delays_nobody(
        serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator.http, "UNACKNOWLEDGED_SECONDS", 1)

    async def check(url: str, feed: Feed) -> None:
        writer = await stalled(url)
        async with following(url) as events:
            await anext(events)
            assert feed.viewers == 2
            number = 1
            while feed.viewers == 2:  # until what the kernel buffers is full, and for a second more
                number += 1
                feed.publish({"filler": "x" * 200_000})
                assert (await anext(events))[0] == number
                await asyncio.sleep(0.01)
        writer.close()

    serve(check)


def test_a_slow_viewer_misses_readings_rather_than_having_them_queued() -> None:
    async def check() -> None:
        feed = Feed({"reading": 1})
        events = feed.follow()
        assert (await anext(events)).startswith(b"retry: ")
        assert b'{"reading": 1}' in await anext(events)
        for reading in (2, 3, 4):
            feed.publish({"reading": reading})
        assert await anext(events) == b'id: 4\ndata: {"reading": 4}\n\n'

    asyncio.run(check())


def test_streams_end_with_the_feed(serve: Serve) -> None:
    async def check(url: str, feed: Feed) -> None:
        async with following(url) as events:
            await anext(events)
            feed.close()
            assert await anext(events, None) is not None  # the newest again: nothing is lost by ending
            assert await anext(events, None) is None
        await until(lambda: feed.viewers == 0)

    serve(check)


def test_who_asks_for_no_body_is_answered_and_is_no_viewer(serve: Serve) -> None:
    async def check(url: str, feed: Feed) -> None:
        async with httpx.AsyncClient() as client:
            answer = await client.head(f"{url}/api/events", timeout=5)
            assert (answer.status_code, feed.viewers) == (200, 0)

    serve(check)
