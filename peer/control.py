"""The local control service: `covey.v1.Peer` on a unix socket that only its owner can open."""

import asyncio
import hashlib
import os
import stat
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from peer.supervisor import Supervisor
from proto.peer_pb2 import LeaveReply, LeaveRequest, PeerStatus, PeerWatchRequest, StatusRequest
from proto.peer_pb2_grpc import PeerServicer, add_PeerServicer_to_server
from training.errors import BadInput

MEND = "Remove it, or set XDG_RUNTIME_DIR to a folder of yours."

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]



def runtime_dir() -> Path:
    """The folder of this user's sockets, which may not exist yet. BadInput if others could have put some there."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(base, "covey") if base else Path(tempfile.gettempdir(), f"covey-{os.getuid()}")
    if os.path.lexists(path):
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise BadInput(f"runtime folder {path} (owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o})",
                           expected=f"a folder of user {os.getuid()} with mode 700", mend=MEND)
    return path


def make_runtime_dir() -> None:
    """Make the folder of this user's sockets if it is missing. Raises BadInput."""
    try:
        runtime_dir().mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"runtime folder {error.filename} ({error.strerror})", expected="a folder for sockets",
                       mend=MEND) from None
    runtime_dir()


def socket_path(state_dir: Path) -> Path:
    """Where the peer of `state_dir` answers. A hash, because a socket's path has 107 bytes at most."""
    return runtime_dir() / f"{hashlib.sha256(bytes(state_dir.resolve())).hexdigest()[:16]}.sock"


class PeerService(PeerServicer):
    """Answers from the supervisor's status; Leave sets its `leave`."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    async def Status(self, request: StatusRequest, context: "Context") -> PeerStatus:
        """The peer now."""
        return self._supervisor.status

    async def Watch(self, request: PeerWatchRequest, context: "Context") -> AsyncIterator[PeerStatus]:
        """The peer now and at every interval until it is gone, its last status included."""
        while not self._supervisor.gone.is_set():
            yield self._supervisor.status
            try:
                await asyncio.wait_for(self._supervisor.gone.wait(), max(request.interval_seconds, 0.2))
            except TimeoutError:
                continue
        yield self._supervisor.status

    async def Leave(self, request: LeaveRequest, context: "Context") -> LeaveReply:
        """Leaves in good order; answers when the worker is gone."""
        self._supervisor.leave.set()
        await self._supervisor.gone.wait()
        return LeaveReply(last=self._supervisor.status)


@asynccontextmanager
async def serve_control(supervisor: Supervisor, path: Path) -> AsyncIterator[None]:
    """Serve on the socket `path` meanwhile. The caller holds the state directory that it stands for.

    The socket takes its name once it serves and is closed to others: one that nobody serves was left behind
    by a process that was killed.
    """
    make_runtime_dir()
    server = grpc.aio.server()
    add_PeerServicer_to_server(PeerService(supervisor), server)
    healthy = health.aio.HealthServicer()  # type: ignore[attr-defined]  # missing in its stubs
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    for service in ("", "covey.v1.Peer"):
        await healthy.set(service, health_pb2.HealthCheckResponse.SERVING)
    draft = path.with_suffix(".new")
    server.add_insecure_port(f"unix:{draft}")
    await server.start()
    _publish(draft, path)
    try:
        yield
    finally:
        withdraw(path)
        await server.stop(grace=0.5)


def _publish(draft: Path, path: Path) -> None:
    draft.chmod(0o600)
    draft.replace(path)


def withdraw(path: Path) -> None:
    """Remove a socket that nobody serves any more."""
    path.unlink(missing_ok=True)
