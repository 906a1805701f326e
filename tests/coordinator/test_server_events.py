"""Server-sent events by a real server on loopback: at once, then at every reading, and never more than can be sent."""

import asyncio
import gzip
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

import coordinator.events
import coordinator.http
from averaging.records import PeerRecord
from coordinator.events import MOST_ROWS, Feed
from coordinator.history import History
from coordinator.http import coordinator_app, serve_http
from coordinator.metrics import coordinator_registry
from coordinator.swarm import Peer, SwarmState
from coordinator.view import About, Seen, swarm_json

Serve = Callable[[Callable[[str, Feed], Awaitable[None]]], None]


@pytest.fixture
def serve(about: About, state: SwarmState, now: float) -> Serve:
    """`serve(check)`: await check(url, feed) beside a server."""

    async def run(check: Callable[[str, Feed], Awaitable[None]]) -> None:
        feed = Feed(swarm_json(Seen(state), about, now))
        app = coordinator_app(lambda: Seen(state), about, coordinator_registry(lambda: Seen(state), about),
                              history=History, feed=feed, clock=lambda: now)
        async with serve_http(app, "127.0.0.1", 0) as port, asyncio.timeout(30):
            try:
                await check(f"http://127.0.0.1:{port}", feed)
            finally:
                feed.close()

    return lambda check: asyncio.run(run(check))


@asynccontextmanager
async def following(url: str, coding: str = "identity") -> AsyncIterator[AsyncIterator[tuple[int, Any]]]:
    """The events at `url` as (id, data)."""
    async with httpx.AsyncClient(verify=False) as client, client.stream(  # there is no TLS: it saves time
            "GET", f"{url}/api/events", headers={"accept-encoding": coding}) as answer:
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


def as_json(event: dict[str, Any]) -> dict[str, Any]:
    """A whole event as /api/swarm tells the same."""
    def told(row: dict[str, Any]) -> dict[str, Any]:
        heard = row.pop("heard_seconds")
        return {**row, "last_seen_seconds": event["time_seconds"] - heard}

    return {**event, "peers": [told(dict(row)) for row in sorted(event["peers"], key=lambda row: row["peer_id"])]}


@pytest.mark.parametrize("coding", ["gzip", "identity"])
def test_the_first_event_comes_at_once_and_equals_the_json(serve: Serve, coding: str) -> None:
    async def check(url: str, feed: Feed) -> None:
        async with following(url, coding) as events, httpx.AsyncClient() as client:
            number, event = await anext(events)
            assert (number, as_json(event)) == (1, (await client.get(f"{url}/api/swarm")).json())

    serve(check)


def test_who_follows_gets_what_changed_and_who_comes_gets_all(
        serve: Serve, about: About, state: SwarmState, now: float, record: Callable[..., PeerRecord]) -> None:
    ada, eve = state.peers.values()
    newcomer, faster = Peer(record("12D3new"), now + 1), Peer(replace(ada.record, epoch=8), now + 1)
    later = replace(state, time=now + 1, peers={"12D3ada": faster, "12D3new": newcomer})

    async def check(url: str, feed: Feed) -> None:
        async with following(url, "gzip") as events:
            await anext(events)
            feed.publish(swarm_json(Seen(replace(state, time=now + 1)), about, now + 1))
            _, quiet = await anext(events)
            assert (quiet["changed"], quiet["gone"], quiet["time_seconds"]) == ([], [], now + 1)
            feed.publish(swarm_json(Seen(later), about, now + 1))
            _, event = await anext(events)
            assert {row["peer_id"]: row["epoch"] for row in event["changed"]} == {"12D3ada": 8, "12D3new": 0}
            assert event["gone"] == [eve.record.peer_id]
        async with following(url) as events:
            assert as_json((await anext(events))[1])["peers"] == swarm_json(Seen(later), about, now + 1)["peers"]

    serve(check)


def test_of_very_many_peers_events_have_the_first_rows_and_count_all(
        serve: Serve, about: About, now: float, record: Callable[..., PeerRecord]) -> None:
    many = SwarmState(time=now, peers={f"{i:04d}": Peer(record(f"{i:04d}"), now) for i in reversed(range(1000))})

    async def check(url: str, feed: Feed) -> None:
        feed.publish(swarm_json(Seen(many), about, now))
        async with following(url) as events:
            _, event = await anext(events)
        assert [row["name"] for row in event["peers"]] == [f"{i:04d}" for i in range(MOST_ROWS)]
        assert event["peer_states"] == {"training": 1000}

    serve(check)


def test_a_compressed_stream_is_one_file_from_its_start_to_its_end(serve: Serve) -> None:
    async def check(url: str, feed: Feed) -> None:
        async with httpx.AsyncClient() as client, client.stream(
                "GET", f"{url}/api/events", headers={"accept-encoding": "gzip"}) as answer:
            feed.publish({"epoch": 8})
            feed.close()
            sent = b"".join([chunk async for chunk in answer.aiter_raw()])
        assert answer.headers["content-encoding"] == "gzip"
        assert b'"epoch": 8' in gzip.decompress(sent)  # which checks its length and checksum

    serve(check)


def test_every_viewer_gets_each_new_reading_with_its_number(serve: Serve) -> None:
    async def check(url: str, feed: Feed) -> None:
        async with following(url) as ours, following(url) as theirs:
            assert [(await anext(events))[0] for events in (ours, theirs)] == [1, 1]
            for number in (2, 3):
                feed.publish({"epoch": number})
                assert [await anext(events) for events in (ours, theirs)] == [
                    (number, {"epoch": number, "changed": [], "gone": ["12D3eve", "12D3ada"] * (number == 2)})] * 2

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


def test_a_storm_of_viewers_who_all_come_again_is_served_and_leaves_nothing(serve: Serve) -> None:
    async def visit(url: str, feed: Feed) -> int:
        async with following(url, "gzip") as events:
            await anext(events)
            feed.publish({"epoch": feed.viewers})
            return (await anext(events))[0]

    async def check(url: str, feed: Feed) -> None:
        for _ in range(3):
            numbers = await asyncio.gather(*(visit(url, feed) for _ in range(50)))
            assert len(numbers) == 50
            await until(lambda: feed.viewers == 0)

    serve(check)


def test_a_slow_viewer_misses_readings_rather_than_having_them_queued() -> None:
    async def check() -> None:
        feed = Feed({"reading": 1})
        events = feed.follow()
        assert (await anext(events)).plain.startswith(b"retry: ")
        assert b'{"reading": 1, "peers": []}' in (await anext(events)).plain
        for reading in (2, 3, 4):
            feed.publish({"reading": reading})
        assert (await anext(events)).plain == b'id: 4\ndata: {"reading": 4, "peers": []}\n\n'  # all rows, not changes
        feed.publish({"reading": 5})
        assert (await anext(events)).plain == b'id: 5\ndata: {"reading": 5, "changed": [], "gone": []}\n\n'

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
