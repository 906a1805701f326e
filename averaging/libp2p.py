"""Another process of ours at the libp2p daemon of a DHT node."""

from pathlib import Path

from hivemind.p2p import P2P
from hivemind.p2p.p2p_daemon_bindings.p2pclient import Client
from hivemind.utils.multiaddr import Multiaddr

from averaging.runtime import withdraw_socket


async def attach(daemon: str, name: str) -> P2P:
    """hivemind's P2P.replicate of `daemon`, a multiaddress, but at a socket called `name`; whoever attaches by that
    name takes the place of one that is dead.

    The daemon keeps a dead process's stream handlers, and lets only who listens where that one did take them away.
    """
    address = Multiaddr(daemon)
    socket = Path(address["unix"]).with_name(f"{name}.sock")
    withdraw_socket(socket)
    p2p = P2P()
    p2p._child, p2p._alive, p2p._daemon_listen_maddr = None, True, address
    p2p._client_listen_maddr = Multiaddr(f"/unix{socket}")
    p2p._client = await Client.create(address, p2p._client_listen_maddr)
    await p2p._ping_daemon()
    return p2p
