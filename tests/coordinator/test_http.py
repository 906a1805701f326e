"""The coordinator's HTTP surface, by a real server on loopback."""

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import replace

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.types import ASGIApp

from averaging.records import PeerRecord
from coordinator.events import Feed
from coordinator.history import History, remember
from coordinator.http import coordinator_app, serve_http
from coordinator.metrics import coordinator_registry
from coordinator.ports import listen
from coordinator.swarm import Peer, SwarmState
from coordinator.view import About, Seen, seconds_to_next_epoch
from training.errors import BadInput

PATHS = ("/", "/static/page.js", "/api/swarm", "/api/events", "/api/history", "/metrics", "/healthz")
Get = Callable[..., httpx.Response]


def app_of(state: SwarmState, about: About, registry: CollectorRegistry,
           clock: Callable[[], float] = time.time) -> ASGIApp:
    return coordinator_app(lambda: Seen(state), about, registry, feed=Feed({}), clock=clock,
                           history=lambda: remember(History(), state))


@pytest.fixture
def get(about: About, now: float) -> Get:
    """`get(state, "/path", age=0)`: what a server with `state`, read `age` seconds ago, answers."""

    async def fetch(state: SwarmState, path: str, age: float, headers: dict[str, str]) -> httpx.Response:
        registry = coordinator_registry(lambda: Seen(state), about, lambda: now + age)
        app = app_of(state, about, registry, lambda: now + age)
        async with serve_http(app, "127.0.0.1", 0) as port, httpx.AsyncClient() as client:
            return await client.get(f"http://127.0.0.1:{port}{path}", headers=headers)

    return lambda state, path, age=0.0, **headers: asyncio.run(fetch(state, path, age, headers))


def test_json_has_the_snapshots_fields(get: Get, state: SwarmState, about: About) -> None:
    swarm = get(state, "/api/swarm").json()
    assert (swarm["epoch"], swarm["epoch_samples"], swarm["loss"], swarm["samples_total"]) == (7, 64, 2.5, 1500)
    assert (swarm["fresh"], swarm["link"], swarm["run_id"]) == (True, about.link, about.run_id)
    assert [peer["name"] for peer in swarm["peers"]] == ["ada", "<script>alert(1)</script>"]
    assert swarm["peers"][0]["last_seen_seconds"] == 3.0


def test_json_says_how_long_the_next_epoch_takes(get: Get, state: SwarmState, now: float) -> None:
    assert get(state, "/api/swarm").json()["seconds_to_next_epoch"] == (256 - 64) / 40.0
    assert get(SwarmState(time=now), "/api/swarm").json()["seconds_to_next_epoch"] is None


@pytest.mark.parametrize(("speed", "gathered", "seconds"), [
    (0.0, 0, None), (32.0, 0, 8.0), (32.0, 256, 0.0), (32.0, 999, 0.0), (5e-324, 0, None)])
def test_the_time_to_the_next_epoch(record: Callable[..., PeerRecord], now: float, speed: float, gathered: int,
                                    seconds: float | None) -> None:
    ada = Peer(record("ada", samples_per_second=speed, samples_accumulated=gathered), now)
    assert seconds_to_next_epoch(SwarmState(time=now, peers={"ada": ada}), 256) == seconds


def test_history_comes_as_columns(get: Get, state: SwarmState, now: float) -> None:
    told = get(state, "/api/history").json()
    assert (told["over_time"]["time"], told["over_epochs"]["epoch"], told["over_epochs"]["loss"]) == ([now], [7], [2.5])


def test_page_names_the_run_and_how_to_join(get: Get, state: SwarmState, about: About) -> None:
    page = get(state, "/").text
    assert f"covey join {about.link}<" in page
    assert f"<title>{about.run_id}" in page


def test_page_has_no_script_or_style_but_of_its_own_origin(get: Get, state: SwarmState) -> None:
    answer = get(state, "/")
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert (policy["default-src"], policy["script-src"], policy["connect-src"]) == ("'none'", "'self'", "'self'")
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert not re.findall(r"(?:src|href)=\"(?!/)|<style|<script>|style=| on\w+=", answer.text)


def test_all_that_the_page_loads_is_there_and_is_sent_once(get: Get, state: SwarmState) -> None:
    loaded = {*re.findall(r"(?:src|href)=\"(/static/[^\"]+)", get(state, "/").text), "/static/plotly.min.js"}
    assert len(loaded) == 4
    for path in ("/", *loaded):
        first = get(state, path)
        assert (first.status_code, first.headers["content-encoding"]) == (200, "gzip")
        again = get(state, path, **{"if-none-match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert get(state, path, **{"accept-encoding": "identity"}).content == first.content


@pytest.mark.parametrize("name", ["assets.py", "page.html", "..%2fassets.py", "%2e%2e/view.py", "nothing.js"])
def test_nothing_else_is_served(get: Get, state: SwarmState, name: str) -> None:
    assert get(state, f"/static/{name}").status_code == 404


def test_an_old_reading_is_called_old_everywhere(get: Get, state: SwarmState) -> None:
    assert get(state, "/api/swarm", age=31).json()["fresh"] is False
    assert get(state, "/healthz", age=31).status_code == 503
    assert "covey_epoch " not in get(state, "/metrics", age=31).text


def test_a_fresh_reading_is_healthy(get: Get, state: SwarmState) -> None:
    assert (get(state, "/healthz").status_code, get(state, "/healthz").text) == (200, "ok\n")
    assert get(state, "/api/swarm").headers["cache-control"] == "no-store"


@pytest.mark.parametrize(("accept", "content_type"), [
    ("*/*", "text/plain"), ("application/openmetrics-text; version=1.0.0", "application/openmetrics-text")])
def test_metrics_come_in_the_format_that_is_asked_for(get: Get, state: SwarmState, accept: str,
                                                      content_type: str) -> None:
    answer = get(state, "/metrics", accept=accept)
    assert answer.headers["content-type"].startswith(content_type)
    assert "covey_epoch 7" in answer.text


def test_it_can_only_be_read(about: About, state: SwarmState) -> None:
    async def statuses() -> set[int]:
        app = app_of(state, about, coordinator_registry(lambda: Seen(state), about))
        async with serve_http(app, "127.0.0.1", 0) as port, httpx.AsyncClient() as client:
            return {(await client.request(method, f"http://127.0.0.1:{port}{path}")).status_code
                    for method in ("POST", "PUT", "DELETE") for path in PATHS}

    assert asyncio.run(statuses()) == {405}


def test_an_http_port_in_use_is_bad_input() -> None:
    async def serve(port: int) -> None:
        async with serve_http(Starlette(), "127.0.0.1", port):
            pass

    with listen("127.0.0.1", 0, "a test") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BadInput, match=f"port {port} for HTTP"):
            asyncio.run(serve(port))
    asyncio.run(serve(port))  # and is free again
    asyncio.run(serve(port))


def test_who_needs_an_invite_is_told_where_it_goes(state: SwarmState, about: About) -> None:
    for link, told in ((f"{about.link}/INVITE", True), (about.link, False)):
        closed = replace(about, link=link)

        async def fetch(closed: About = closed) -> str:
            app = app_of(state, closed, CollectorRegistry())
            async with serve_http(app, "127.0.0.1", 0) as port, httpx.AsyncClient() as client:
                return (await client.get(f"http://127.0.0.1:{port}/")).text

        assert ("in the place of INVITE" in asyncio.run(fetch())) == told
