"""The coordinator's HTTP surface, by a real server on loopback."""

import asyncio
import re
from base64 import b64encode
from collections.abc import Callable
from hashlib import sha256

import httpx
import pytest
from starlette.applications import Starlette

from coordinator.http import coordinator_app, serve_http
from coordinator.metrics import coordinator_registry
from coordinator.ports import listen
from coordinator.swarm import SwarmState
from coordinator.view import About
from training.errors import BadInput

Get = Callable[..., httpx.Response]


@pytest.fixture
def get(about: About, now: float) -> Get:
    """`get(state, "/path", age=0)`: what a server with `state`, read `age` seconds ago, answers."""

    async def fetch(state: SwarmState, path: str, age: float, headers: dict[str, str]) -> httpx.Response:
        registry = coordinator_registry(lambda: state, about, lambda: now + age)
        app = coordinator_app(lambda: state, about, registry, lambda: now + age)
        async with serve_http(app, "127.0.0.1", 0) as port, httpx.AsyncClient() as client:
            return await client.get(f"http://127.0.0.1:{port}{path}", headers=headers)

    return lambda state, path, age=0.0, **headers: asyncio.run(fetch(state, path, age, headers))


def test_json_has_the_snapshots_fields(get: Get, state: SwarmState, about: About) -> None:
    swarm = get(state, "/api/swarm").json()
    assert (swarm["epoch"], swarm["epoch_samples"], swarm["loss"], swarm["samples_total"]) == (7, 64, 2.5, 1500)
    assert (swarm["fresh"], swarm["link"], swarm["run_id"]) == (True, about.link, about.run_id)
    assert [peer["name"] for peer in swarm["peers"]] == ["ada", "<script>alert(1)</script>"]
    assert swarm["peers"][0]["last_seen_seconds"] == 3.0


def test_page_shows_the_figures_and_how_to_join(get: Get, state: SwarmState, about: About) -> None:
    page = get(state, "/").text
    for shown in (f"covey join {about.link}", "64 <small>of 256 samples</small>", "2.5000", "40.0", "3 s ago",
                  "6 joined, 3 left, 1 lost, 1,500 samples"):
        assert shown in page


def test_a_volunteers_name_stays_text(get: Get, state: SwarmState) -> None:
    page = get(state, "/").text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script>alert" not in page


def test_page_runs_its_own_script_and_nothing_else(get: Get, state: SwarmState) -> None:
    answer = get(state, "/")
    policy = answer.headers["content-security-policy"]
    for tag in ("script", "style"):
        [inline] = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        assert f"{tag}-src 'sha256-{b64encode(sha256(inline.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'")
    assert not re.findall(r"(?:src|href)=\"(?!/)", answer.text)


def test_an_empty_swarm_says_what_is_missing(get: Get, now: float) -> None:
    assert "No peer is here. Start one" in get(SwarmState(time=now), "/").text


def test_an_old_reading_is_called_old_everywhere(get: Get, state: SwarmState) -> None:
    assert "could not read the DHT lately" in get(state, "/", age=31).text
    assert get(state, "/api/swarm", age=31).json()["fresh"] is False
    assert get(state, "/healthz", age=31).status_code == 503
    assert "covey_epoch " not in get(state, "/metrics", age=31).text


def test_a_fresh_reading_is_healthy(get: Get, state: SwarmState) -> None:
    assert (get(state, "/healthz").status_code, get(state, "/healthz").text) == (200, "ok\n")
    assert "could not" not in get(state, "/").text


def test_before_the_first_reading_it_says_so(get: Get) -> None:
    assert "has not been read yet" in get(SwarmState(), "/").text


@pytest.mark.parametrize(("accept", "content_type"), [
    ("*/*", "text/plain"), ("application/openmetrics-text; version=1.0.0", "application/openmetrics-text")])
def test_metrics_come_in_the_format_that_is_asked_for(get: Get, state: SwarmState, accept: str,
                                                      content_type: str) -> None:
    answer = get(state, "/metrics", accept=accept)
    assert answer.headers["content-type"].startswith(content_type)
    assert "covey_epoch 7" in answer.text


def test_it_can_only_be_read(about: About, state: SwarmState) -> None:
    async def statuses() -> set[int]:
        app = coordinator_app(lambda: state, about, coordinator_registry(lambda: state, about))
        async with serve_http(app, "127.0.0.1", 0) as port, httpx.AsyncClient() as client:
            return {(await client.request(method, f"http://127.0.0.1:{port}{path}")).status_code
                    for method in ("POST", "PUT", "DELETE") for path in ("/", "/api/swarm", "/metrics", "/healthz")}

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
