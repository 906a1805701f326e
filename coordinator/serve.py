"""What a coordinator does while it runs: it serves gRPC and HTTP, and follows the swarm."""

import asyncio
import json
import logging
import random
import signal
import sqlite3
import time
from collections.abc import Callable, Collection
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from averaging.experiment import Experiment, canonical, fingerprint, run_id
from averaging.records import AVERAGED
from averaging.version import VERSION
from coordinator.admin import AdminService, admin_token, serve_admin
from coordinator.admin_socket import admin_socket
from coordinator.archive import ArchiveOptions
from coordinator.archiving import Archiver, archiving
from coordinator.authority import Authority
from coordinator.crediting import Crediting
from coordinator.events import Feed
from coordinator.follow import SwarmFollower, under_enrolled_names
from coordinator.http import coordinator_app, serve_http
from coordinator.in_step import InStep
from coordinator.link import Link, bracketed, parse_link
from coordinator.metrics import coordinator_registry
from coordinator.node import Node
from coordinator.past import PastFile
from coordinator.replica import Own, ReplicaService, heard_lately, others
from coordinator.service import CoordinatorService, bind_grpc, start_grpc
from coordinator.swarm import SwarmState
from coordinator.tls import Certificate
from coordinator.view import INVITE, About, Seen, swarm_json, view
from proto.authority_pb2_grpc import add_AdminServicer_to_server
from proto.coordinator_pb2 import EnrolReply
from proto.replica_pb2_grpc import add_ReplicaServicer_to_server
from proto.swarm_pb2 import SwarmSnapshot

POLL_SECONDS = 1.0  # between two readings of the records
GRACE_SECONDS = 1.0  # that open calls get to end
BOOTSTRAP = 4  # peers whose addresses a newcomer gets besides the coordinator's

logger = logging.getLogger("covey.coordinator")


async def serve(experiment: Experiment, authority: Authority, certificate: Certificate, node: Node, folder: Path, *,
                host: str, link_host: str, grpc_port: int, http_port: int, json_output: bool,
                archive_options: ArchiveOptions | None = None) -> None:
    """Until the first SIGTERM or SIGINT. Raises BadInput if a port was taken meanwhile."""
    stop, run = _stop_event(), run_id(experiment)
    names, averaging = authority.ledger.names, experiment.averaging

    def banned() -> Collection[str]:
        return authority.ban_file.newest().peer_ids

    follower = SwarmFollower(lambda: under_enrolled_names(node.read(), names()), banned=banned,
                             stale_seconds=averaging.report_progress_expiration,
                             past_file=PastFile(folder / "past.json"))
    before = follower.state
    await follower.refresh()
    crediting = Crediting(node.read_receipts, authority.credits, names=names, banned=banned,
                          most_samples=averaging.target_batch_size)
    archiver = archive_options and Archiver(archive_options, experiment, authority.public_key, node, folder)
    server, grpc_port = bind_grpc(host, grpc_port, certificate)

    def link(invite: str) -> str:
        return str(Link(link_host, grpc_port, run, certificate.fingerprint, invite))

    own = Own(node.peer_id, parse_link(link("")), node.addresses)
    in_step = InStep(authority, own)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(server.stop, GRACE_SECONDS)
        about = About(run, link("" if authority.is_open else INVITE), VERSION, averaging.target_batch_size,
                      averaging.target_group_size, AVERAGED[averaging.strategy])

        def seen() -> Seen:
            return Seen(follower.state, archiver.archive if archiver else None, crediting.leaderboard)

        def newest() -> dict[str, Any]:
            return swarm_json(seen(), about, time.time())

        feed = Feed(newest())
        registry = coordinator_registry(seen, about, failures=authority.failures, before=before,
                                        replicas=lambda: in_step.heard)
        app = coordinator_app(seen, about, registry, history=lambda: follower.history, feed=feed)
        http_port = await stack.enter_async_context(serve_http(app, host, http_port))
        stack.callback(feed.close)  # before the server, which waits for open requests
        url = f"http://{bracketed(link_host)}:{http_port}"
        offer = _offer(experiment, authority, dashboard_url=f"{url}/")

        def complete() -> EnrolReply:
            return _with_addresses(offer, authority, own, follower.state)

        add_AdminServicer_to_server(AdminService(authority, link, node.publish_bans, admin_token(folder)), server)
        add_ReplicaServicer_to_server(ReplicaService(
            authority, own, document=offer.experiment, folder=folder, token=admin_token(folder), version=VERSION,
            initial_peers=lambda: complete().initial_peers), server)
        await start_grpc(server, CoordinatorService(
            authority, complete, VERSION, lambda: SwarmSnapshot(**view(seen(), about)),
            lambda: crediting.leaderboard))
        await stack.enter_async_context(serve_admin(
            AdminService(authority, link, node.publish_bans), admin_socket(folder)))
        invite = "" if authority.is_open else authority.invite_to_show
        _announce(None if invite is None else link(invite), url, node.peer_id, folder, json_output)
        stack.callback(follower.keep)
        stack.callback(asyncio.create_task(crediting.keep()).cancel)
        stack.callback(asyncio.create_task(in_step.keep(stop)).cancel)

        def look() -> None:
            if archiver:
                archiver.look(follower.state)
            feed.publish(newest())  # also after a reading that failed: the page then says how old its figures are

        if archiver:
            await stack.enter_async_context(archiving(archiver))
        await _follow(follower, authority, node, stop, look)
        logger.info("stopping")


def _offer(experiment: Experiment, authority: Authority, *, dashboard_url: str) -> EnrolReply:
    """What stays the same of what all get who are let in."""
    document = canonical(experiment)
    return EnrolReply(experiment=document, fingerprint=fingerprint(document), run_id=run_id(experiment),
                      dashboard_url=dashboard_url, authority=authority.public_key,
                      experiment_signature=authority.sign_experiment(document))


def _with_addresses(offer: EnrolReply, authority: Authority, own: Own, state: SwarmState) -> EnrolReply:
    """... and what does not: several addresses, so that a newcomer gets in, and stays, while one of us is away."""
    reply = EnrolReply()
    reply.CopyFrom(offer)
    reachable = [peer.record.addresses[0] for peer in state.peers.values() if peer.record.addresses]
    lately = heard_lately(others(authority.ledger.facts(), own), time.time())
    reply.initial_peers.extend([*own.addresses, *(address for other in lately for address in other.addresses.split()),
                                *random.sample(reachable, min(BOOTSTRAP, len(reachable)))])
    reply.coordinators.extend([str(own.link), *(other.link for other in lately)])
    reply.bans = authority.ban_file.newest().signed
    return reply


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


async def _follow(follower: SwarmFollower, authority: Authority, node: Node, stop: asyncio.Event,
                  look: Callable[[], None]) -> None:
    known = frozenset[str]()
    while not stop.is_set():
        if not node.is_alive():
            logger.error("the DHT node died; exiting, so that whoever supervises this process starts it again")
            raise SystemExit(1)
        await follower.refresh()
        try:
            if await asyncio.to_thread(authority.tend_bans):
                node.publish_bans()
        except (OSError, sqlite3.Error) as error:  # a full disk: the last list stands
            logger.warning("the list of bans could not be signed: %s", error)
        known = _remember(node, follower.state, known)
        look()
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), POLL_SECONDS)


def _remember(node: Node, state: SwarmState, known: frozenset[str]) -> frozenset[str]:
    """Keep the peers' addresses for the next start, if they are not the `known` ones; those that are kept."""
    there = frozenset(address for peer in state.peers.values() for address in peer.record.addresses)
    if there != known:
        try:
            node.remember(there)
        except OSError as error:
            logger.warning("the peers' addresses could not be kept: %s", error)
    return there


def _announce(link: str | None, url: str, peer_id: str, folder: Path, json_output: bool) -> None:
    if json_output:
        print(json.dumps({"event": "ready", "link": link, "metrics_url": f"{url}/metrics", "dashboard_url": f"{url}/",
                          "peer_id": peer_id, "state_dir": str(folder)}), flush=True)
        return
    console = Console(highlight=False)
    how = f"[bold]covey join {link}[/]" if link else "no invite is good for any number of volunteers: " \
        "`covey invite create` makes one"
    for name, value in (("join by", how), ("status page", f"{url}/"), ("metrics", f"{url}/metrics"),
                        ("state", str(folder))):
        console.print(f"[dim]{name:>12}[/]  {value}", soft_wrap=True)
