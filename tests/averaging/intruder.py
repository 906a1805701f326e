"""A stranger: a libp2p node with an identity of its own, that knows the protocol and keeps to none of it."""

import asyncio
import logging
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError
from hivemind.utils.crypto import RSAPrivateKey
from swarm_peers import RUN, Peer

from averaging.authorisation import MemberAuthoriser, issue_token
from averaging.dht import open_identity
from averaging.transports.swarm.averager import _Raw
from averaging.transports.swarm.wire import Wire
from proto.round_pb2 import Ack

AUTHORITY, OTHER_AUTHORITY = RSAPrivateKey(), RSAPrivateKey()
MESSAGE, STATE = f"covey.{RUN}.message", f"covey.{RUN}.state"
PATIENCE = 20.0  # seconds that anything here may take
Result = TypeVar("Result")


def public(key: RSAPrivateKey) -> bytes:
    return bytes(key.get_public_key().to_bytes())


def token(key: RSAPrivateKey, *, authority: RSAPrivateKey = AUTHORITY, run_id: str = RUN, hours: float = 1.0) -> bytes:
    """For the holder of `key`, from the test's authority."""
    return issue_token(authority, run_id=run_id, public_key=public(key), name="somebody",
                       expires=datetime.now(UTC) + timedelta(hours=hours))


def member(key: RSAPrivateKey) -> MemberAuthoriser:
    """A member's, by whom strangers are to be kept out."""
    own = token(key)
    return MemberAuthoriser(key, authority=public(AUTHORITY), run_id=RUN, read_token=lambda: own)


class Presenting:
    """Presents a token, whosever it is, and takes anything."""

    def __init__(self, token: bytes) -> None:
        self.token = token

    def refusal(self, peer_id: str, token: bytes) -> str | None:
        return None


class Intruder:
    """What it asks for is done by an event loop in a thread of its own."""

    def __init__(self, path: Path, addresses: Sequence[str]) -> None:
        self.key, self.loop = open_identity(path), asyncio.new_event_loop()
        self._thread = Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.p2p: P2P = self.do(P2P.create(identity_path=str(path), initial_peers=list(addresses),
                                           host_maddrs=["/ip4/127.0.0.1/tcp/0"]))

    @property
    def id(self) -> str:
        return str(self.p2p.peer_id)

    def do(self, work: Coroutine[Any, Any, Result]) -> Result:
        """What `work` returns."""
        return self.start(work).result()

    def start(self, work: Coroutine[Any, Any, Result]) -> "Future[Result]":
        """`do`, in the background."""
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, PATIENCE), self.loop)

    def wire(self, token: bytes) -> Wire:
        """Its messages, with this token."""
        return Wire(RUN, self.key, Presenting(token), most_weight=1e18)

    def call(self, peer: Peer, data: bytes, handler: str = MESSAGE) -> str:
        """What the peer says against a message; empty: it was taken."""
        return self.do(self.tell(peer.id, data, handler))

    async def tell(self, peer_id: str, data: bytes, handler: str = MESSAGE) -> str:
        """As `call`, within the loop."""
        try:
            await self.p2p.call_protobuf_handler(PeerID.from_base58(peer_id), handler, _Raw(data), Ack)
        except (P2PDaemonError, P2PHandlerError) as error:
            return str(error) or type(error).__name__
        return ""

    def stream(self, peer: Peer, handler: str, data: bytes, *, close: bool = False) -> bytes:
        """All that the peer answers to these bytes, until it closes the stream."""
        return self.do(self.converse(peer.id, handler, data, close=close))

    async def converse(self, peer_id: str, handler: str, data: bytes, *, close: bool = False) -> bytes:
        """As `stream`, within the loop. `close`: close this side first."""
        try:
            _, reader, writer = await self.p2p.call_binary_stream_handler(PeerID.from_base58(peer_id), handler)
        except P2PDaemonError:
            return b""
        answer = b""
        try:
            with suppress(OSError):
                writer.write(data)
                await writer.drain()
                if close:
                    writer.write_eof()
                while piece := await reader.read(1 << 16):
                    answer += piece
        finally:
            writer.close()
        return answer

    def close(self) -> None:
        self.do(self.p2p.shutdown())
        asyncio.run_coroutine_threadsafe(cancelled(), self.loop).result(PATIENCE)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


async def cancelled() -> None:
    """What else goes on in this loop has ended."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


@contextmanager
def logged(path: Path) -> Iterator[Path]:
    """What is logged, also by processes that are forked meanwhile, is written to this file, too."""
    handler = logging.FileHandler(path)
    logging.getLogger().addHandler(handler)
    try:
        yield path
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def addresses(peers: Sequence[Peer]) -> list[str]:
    """Where they can be reached."""
    return [str(maddr) for peer in peers for maddr in peer.dht.get_visible_maddrs()]
