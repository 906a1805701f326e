"""The coordinator's process: first node of the DHT, notary of one experiment, and window on its swarm.

It keeps nothing that training needs: peers go on without it, and a restart on the same state directory and
ports is the same node with the same link.
"""

import asyncio
import json
import logging
import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop
from rich.console import Console

from averaging.experiment import Experiment, canonical, fingerprint, run_id
from averaging.records import AVERAGED
from averaging.version import VERSION
from coordinator.events import Feed
from coordinator.follow import SwarmFollower
from coordinator.http import coordinator_app, serve_http
from coordinator.link import Link, bracketed
from coordinator.metrics import coordinator_registry
from coordinator.ports import check_hosts, free_port, reachable_host
from coordinator.service import CoordinatorService, bind_grpc, start_grpc
from coordinator.state_dir import open_state_dir
from coordinator.view import About, swarm_json, view
from proto.coordinator_pb2 import EnrolReply
from proto.swarm_pb2 import SwarmSnapshot

if TYPE_CHECKING:
    from coordinator.node import Node

POLL_SECONDS = 1.0  # between two readings of the records
GRACE_SECONDS = 1.0  # that open calls get to end

logger = logging.getLogger("covey.coordinator")


def run_coordinator(experiment: Experiment, *, state_dir: Path, host: str = "0.0.0.0",  # noqa: S104
                    announce_host: str | None = None, p2p_port: int = 31337, grpc_port: int = 31338,
                    http_port: int = 31339, json_output: bool = False) -> None:
    """Run the coordinator of `experiment` until SIGTERM or SIGINT; a second one ends it at once.

    Call it from the main thread, before anything starts threads or gRPC. It listens at `host`, tells volunteers
    to call `announce_host` (None: an address of this machine), and takes any free port for 0. Prints where
    it can be reached, as text or as one line of JSON. Raises BadInput before anything is started; exits with
    status 1 if its DHT node dies, so that a supervisor starts it again.
    """
    check_hosts(host, announce_host)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    with open_state_dir(state_dir, role="coordinator", run_id=run_id(experiment)) as folder:
        for port, purpose in ((grpc_port, "gRPC"), (http_port, "HTTP")):
            free_port(host, port, purpose)
        p2p_port = free_port(host, p2p_port, "libp2p")
        from coordinator.node import running_node  # noqa: PLC0415 - it takes seconds; bad input should not
        with running_node(run_id(experiment), folder, host, announce_host, p2p_port) as node:
            uvloop.run(_serve(experiment, node, folder, host=host, link_host=announce_host or reachable_host(host),
                              grpc_port=grpc_port, http_port=http_port, json_output=json_output))


async def _serve(experiment: Experiment, node: "Node", folder: Path, *, host: str, link_host: str, grpc_port: int,
                 http_port: int, json_output: bool) -> None:
    stop, document, run = _stop_event(), canonical(experiment), run_id(experiment)
    follower = SwarmFollower(node.read, stale_seconds=experiment.averaging.report_progress_expiration)
    await follower.refresh()
    server, grpc_port = bind_grpc(host, grpc_port)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(server.stop, GRACE_SECONDS)
        about = About(run, str(Link(link_host, grpc_port, run)), VERSION, experiment.averaging.target_batch_size,
                      experiment.averaging.target_group_size, AVERAGED[experiment.averaging.strategy])
        feed = Feed(_newest(follower, about))
        app = coordinator_app(lambda: follower.state, about, coordinator_registry(lambda: follower.state, about),
                              history=lambda: follower.history, feed=feed)
        http_port = await stack.enter_async_context(serve_http(app, host, http_port))
        stack.callback(feed.close)  # before the server, which waits for open requests
        url = f"http://{bracketed(link_host)}:{http_port}"
        enrolment = EnrolReply(experiment=document, fingerprint=fingerprint(document), run_id=run,
                               initial_peers=node.addresses, dashboard_url=f"{url}/")
        await start_grpc(server, CoordinatorService(
            enrolment, VERSION, lambda: SwarmSnapshot(**view(follower.state, about))))
        _announce(about.link, url, node.peer_id, folder, json_output)
        await _follow(follower, node.is_alive, stop, lambda: feed.publish(_newest(follower, about)))
        logger.info("stopping")


def _stop_event() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT, which also gives both back their usual effect: ending the process."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def first() -> None:
        stop.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, first)
    return stop


def _newest(follower: SwarmFollower, about: About) -> dict[str, Any]:
    return swarm_json(follower.state, about, time.time())


async def _follow(follower: SwarmFollower, is_alive: Callable[[], bool], stop: asyncio.Event,
                  publish: Callable[[], None]) -> None:
    while not stop.is_set():
        if not is_alive():
            logger.error("the DHT node died; exiting, so that whoever supervises this process starts it again")
            raise SystemExit(1)
        await follower.refresh()
        publish()  # also after a reading that failed: the page then says how old its figures are
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), POLL_SECONDS)


def _announce(link: str, url: str, peer_id: str, folder: Path, json_output: bool) -> None:
    if json_output:
        print(json.dumps({"event": "ready", "link": link, "metrics_url": f"{url}/metrics", "dashboard_url": f"{url}/",
                          "peer_id": peer_id, "state_dir": str(folder)}), flush=True)
        return
    console = Console(highlight=False)
    for name, value in (("join by", f"[bold]covey join {link}[/]"), ("status page", f"{url}/"),
                        ("metrics", f"{url}/metrics"), ("state", str(folder))):
        console.print(f"[dim]{name:>12}[/]  {value}", soft_wrap=True)
