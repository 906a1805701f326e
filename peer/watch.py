"""`covey status`: this machine's peers, or a coordinator's swarm, once or until Ctrl-C."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
from rich.console import Console, RenderableType
from rich.live import Live

from coordinator.calls import explain
from coordinator.link import MEND, Link
from coordinator.tls import connect
from peer.enrol import TIMEOUT_SECONDS
from peer.local import local_peers
from peer.plain import plain
from peer.tables import peers_list, swarm_table
from proto.coordinator_pb2 import WatchRequest
from proto.coordinator_pb2_grpc import CoordinatorStub
from training.errors import BadInput

INTERVAL_SECONDS = 1.0
CLOSING_SECONDS = 1.0
INTERRUPTED = 130  # the shell's 128 + SIGINT
View = tuple[dict[str, Any], RenderableType]  # for programs, and for people


async def show(link: Link | None, *, watch: bool, as_json: bool) -> int:
    """Print the swarm behind `link`, or without one this machine's peers; the exit code. Raises BadInput."""
    interrupted = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupted.set)
    showing = asyncio.create_task(_show(link, watch=watch, as_json=as_json))
    stop = asyncio.create_task(interrupted.wait())
    await asyncio.wait({showing, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if showing.done():
        showing.result()
        return 0
    showing.cancel()  # gives the terminal back
    await asyncio.wait({showing}, timeout=CLOSING_SECONDS)
    if not showing.done():  # gRPC has been seen to sit on a cancelled stream; there is nothing else to put in order
        os._exit(INTERRUPTED)
    return INTERRUPTED


async def _show(link: Link | None, *, watch: bool, as_json: bool) -> None:
    views = _swarm(link, watch) if link else _peers(watch)
    console = Console()
    if as_json:
        async for data, _ in views:
            print(json.dumps(data), flush=True)
    elif watch and console.is_terminal:
        with Live(console=console, auto_refresh=False, screen=True) as live:
            async for _, view in views:
                live.update(view, refresh=True)
    else:
        async for _, view in views:
            console.print(view)


async def _swarm(link: Link, watch: bool) -> AsyncIterator[View]:
    request = WatchRequest(interval_seconds=INTERVAL_SECONDS if watch else 0)
    async with await connect(link, timeout_seconds=TIMEOUT_SECONDS) as channel:
        call = CoordinatorStub(channel).Watch(request, timeout=None if watch else TIMEOUT_SECONDS)
        try:
            async for swarm in call:
                if swarm.run_id != link.run_id:
                    raise BadInput(f"{link.address} runs {swarm.run_id!r}", expected=f"{link.run_id}, as in the "
                                   "link", mend=f"The link may be stale. {MEND}")
                yield plain(swarm), swarm_table(swarm, time.time())
        except grpc.aio.AioRpcError as error:
            raise explain(link, error) from None


async def _peers(watch: bool) -> AsyncIterator[View]:
    while True:
        peers = await local_peers()
        yield {"peers": [plain(peer) for peer in peers]}, peers_list(peers, time.time())
        if not watch:
            return
        await asyncio.sleep(INTERVAL_SECONDS)
