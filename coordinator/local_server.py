"""gRPC on a socket of this machine that only its owner can open."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from grpc import aio

from averaging.runtime import make_runtime_dir, withdraw_socket


@asynccontextmanager
async def serve_locally(server: aio.Server, path: Path) -> AsyncIterator[None]:
    """Serve on the socket `path` meanwhile. The caller holds the state directory that it stands for.

    The socket takes its name once it serves and is closed to others: one that nobody serves was left behind
    by a process that was killed.
    """
    make_runtime_dir()
    draft = path.with_suffix(".new")
    server.add_insecure_port(f"unix:{draft}")
    await server.start()
    _publish(draft, path)
    try:
        yield
    finally:
        withdraw_socket(path)
        await server.stop(grace=0.5)


def _publish(draft: Path, path: Path) -> None:
    draft.chmod(0o600)
    draft.replace(path)
