"""This machine's peers, as another process of their owner reaches them: by their control sockets."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from averaging.runtime import runtime_dir, withdraw_socket
from peer.control import socket_path
from proto.peer_pb2 import LeaveRequest, PeerStatus, StatusRequest
from proto.peer_pb2_grpc import PeerStub
from training.errors import BadInput

if TYPE_CHECKING:
    from proto.peer_pb2_grpc import PeerAsyncStub

ANSWER_SECONDS = 2.0
LEAVE_SECONDS = 15.0  # a peer takes 10 at most


async def local_peers() -> list[PeerStatus]:
    """The status of every peer of this user on this machine, by name. Sockets that nobody serves are removed."""
    found = [await _status(socket) for socket in sorted(runtime_dir().glob("*.sock"))]
    return sorted((status for status in found if status), key=lambda status: (status.name, status.state_dir))


async def leave(state_dir: Path | None) -> PeerStatus:
    """Ask the peer of `state_dir`, or this machine's only one, to leave; its last status.

    Raises BadInput if there is none, if there are several to choose from, or if it doesn't leave in time.
    """
    socket = socket_path(state_dir or await _only_one())
    if not socket.exists() or not await _status(socket):
        raise BadInput(f"no peer runs with state directory {state_dir}", expected="a peer of yours",
                       mend="`covey status` lists them.")
    try:
        async with _peer(socket) as peer:
            return (await peer.Leave(LeaveRequest(), timeout=LEAVE_SECONDS)).last
    except grpc.aio.AioRpcError as error:
        raise BadInput(f"the peer did not leave ({error.details()})", expected="an answer within "
                       f"{LEAVE_SECONDS:g} s", mend="Its log says more.") from None


async def _only_one() -> Path:
    running = [status.state_dir for status in await local_peers()]
    if len(running) != 1:
        raise BadInput(f"{len(running)} peers on this machine" + "".join(f", {name}" for name in running),
                       expected="one, to know which is to leave",
                       mend="Choose with --state-dir." if running else "`covey join` starts one.")
    return Path(running[0])


async def _status(socket: Path) -> PeerStatus | None:
    try:
        async with _peer(socket) as peer:
            return await peer.Status(StatusRequest(), timeout=ANSWER_SECONDS)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            withdraw_socket(socket)
        return None


@asynccontextmanager
async def _peer(socket: Path) -> AsyncIterator["PeerAsyncStub"]:
    async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
        yield PeerStub(channel)
