"""The DHT node: hivemind's, in a child process that doesn't outlive us, with a persistent identity."""

import averaging.fork  # noqa: F401

# isort: split
import asyncio.subprocess
import os
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import hivemind
import psutil
from hivemind.dht.node import DHTNode
from hivemind.dht.validation import RecordValidatorBase
from hivemind.p2p import P2P
from hivemind.utils.auth import AuthorizerBase
from hivemind.utils.crypto import RSAPrivateKey

from averaging.holders import Found, Holders
from averaging.identity import open_key
from averaging.pending_calls import mend_pending_calls
from averaging.process import die_with_parent
from averaging.runtime import libp2p_sockets, make_runtime_dir, remove_libp2p_sockets


class DHT(hivemind.DHT):  # type: ignore[misc]  # hivemind is untyped
    """hivemind.DHT whose process and libp2p daemon die with their parents (stock ones stay behind).

    Any thread may call it, with values of any size: what several threads say at once reaches the process one after the
    other, and whole (stock: mixed up from 16 KiB on, cut off where the pipe is full; the process does not survive it).
    """

    _p2pd: psutil.Process | None = None
    _holders: Holders  # in the child

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        lock, send = Lock(), self._outer_pipe.send

        def send_whole(message: object) -> None:
            with lock:
                send(message)
        self._outer_pipe.send = send_whole

    def run(self) -> None:
        """The child's main: as hivemind's, after tying our life, and p2pd's, to the parent's."""
        die_with_parent(self._parent_pid)
        # P2P.create offers no hook for its subprocess, and this process does nothing but serve hivemind
        asyncio.subprocess.create_subprocess_exec = partial(
            asyncio.subprocess.create_subprocess_exec, preexec_fn=die_with_parent)
        mend_pending_calls()
        receive = self._inner_pipe.recv

        def receive_whole() -> Any:
            os.set_blocking(self._inner_pipe.fileno(), True)  # uvloop, which watches it, has undone that
            return receive()
        self._inner_pipe.recv = receive_whole
        super().run()

    def tell(self, key: str, subkey: Any, value: Any, expires: float) -> "Future[bool]":
        """Store an entry of the dictionary `key` until `expires` (DHT time), as averaging/holders.py does; at once.

        The future is done when nodes have it, and false if none took it.
        """
        told: Future[bool] = self.run_coroutine(
            partial(_tell, key=key, subkey=subkey, value=value, expires=expires), return_future=True)
        return told

    def look(self, key: str) -> "Future[Found]":
        """The entries of the dictionary `key`, in the future."""
        found: Future[Found] = self.run_coroutine(partial(_look, key=key), return_future=True)
        return found

    @property
    def is_serving(self) -> bool:
        """Whether node and libp2p daemon run. hivemind goes on without the latter, as an island."""
        if self._p2pd is None:
            self._p2pd = next(child for child in psutil.Process(self.pid).children() if child.name() == "p2pd")
        with suppress(psutil.NoSuchProcess):
            return bool(self.is_alive() and self._p2pd.status() != psutil.STATUS_ZOMBIE)
        return False

    def daemon_address(self, timeout: float) -> str:
        """Where libp2p's daemon takes the orders of this user's processes, as a multiaddress."""
        return str(self.run_coroutine(_daemon_address, return_future=True).result(timeout=timeout))

    def shutdown(self) -> None:
        """Take leave of the DHT if that works at once; nothing of the node remains, sockets included."""
        with suppress(OSError):  # its process may be gone already
            super().shutdown()
        if self.is_alive():
            self.kill()
            self.join()
        remove_libp2p_sockets(Path(self.kwargs["identity_path"]))


def start_dht(*, identity_path: Path, host_maddrs: Sequence[str], initial_peers: Sequence[str] = (),
              announce_maddrs: Sequence[str] = (), record_validators: Sequence[RecordValidatorBase] = (),
              authorizer: AuthorizerBase | None = None, client_mode: bool = False,
              startup_timeout: float = 30.0) -> DHT:
    """Start a DHT node and wait until it serves; call from the main thread, before CUDA, gRPC or threads.

    `identity_path` holds the libp2p key that fixes the peer id (`open_identity` makes it). `authorizer` signs and
    checks every request and answer (averaging/authorisation.py); None: the DHT is open. `client_mode`: accept no
    incoming connections. Raises hivemind's P2PDaemonError when the daemon can't start or no initial peer
    answers, TimeoutError after `startup_timeout` seconds; the child is gone then.
    """
    make_runtime_dir()
    remove_libp2p_sockets(identity_path)
    sockets = libp2p_sockets(identity_path)
    sockets.mkdir(mode=0o700)
    P2P._UNIX_SOCKET_PREFIX = f"/unix{sockets}/"  # stock: /tmp, where any user may open them, and where they stay
    dht = DHT(initial_peers=list(initial_peers) or None, host_maddrs=list(host_maddrs),
              announce_maddrs=list(announce_maddrs) or None, identity_path=str(identity_path),
              record_validators=list(record_validators), authorizer=authorizer, client_mode=client_mode,
              check_if_identity_free=False, startup_timeout=startup_timeout, shutdown_timeout=1.0, start=False)
    try:
        dht.run_in_background(await_ready=True, timeout=startup_timeout)
        dht.run_coroutine(_serve)
    except BaseException:
        dht.kill()
        dht.join()
        dht.shutdown()
        raise
    return dht


async def _serve(dht: DHT, node: DHTNode) -> None:
    dht._holders = Holders(node)
    await dht._holders.serve()


async def _tell(dht: DHT, node: DHTNode, *, key: str, subkey: Any, value: Any, expires: float) -> bool:
    return await dht._holders.store(key, subkey, value, expires)


async def _look(dht: DHT, node: DHTNode, *, key: str) -> Found:
    return await dht._holders.read(key)


def open_identity(identity_path: Path) -> RSAPrivateKey:
    """The private key behind the peer id, made on first use. It signs this peer's records as well. Raises BadInput."""
    key = RSAPrivateKey.__new__(RSAPrivateKey)  # hivemind's makes a new one
    key._private_key = open_key(identity_path)
    return key


async def _daemon_address(_dht: Any, node: Any) -> str:
    """Runs in the DHT's process."""
    return str(node.p2p.daemon_listen_maddr)
