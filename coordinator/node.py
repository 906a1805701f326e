"""The coordinator's DHT node: the swarm's first, always the same peer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
from hivemind.p2p import P2PDaemonError

from averaging.dht import DHT, open_identity, start_dht
from averaging.progress import read_records, record_validators
from averaging.records import PeerRecord
from coordinator.ports import multiaddress

READ_SECONDS = 2.0  # that one reading of the records may take


@dataclass(frozen=True)
class Node:
    """A running node: `read` gives the peers' records or raises, `is_alive` whether all its processes run."""

    peer_id: str
    addresses: list[str]  # multiaddresses to reach it by
    read: Callable[[], list[PeerRecord]]
    is_alive: Callable[[], bool]


@contextmanager
def running_node(run_id: str, folder: Path, host: str, announce_host: str | None, port: int) -> Iterator[Node]:
    """A node with the identity in `folder`, at the IP address `host`, until the context ends.

    Exits with status 1 if it does not start.
    """
    identity = folder / "identity.key"
    try:
        dht = start_dht(
            record_validators=record_validators(run_id, open_identity(identity)), identity_path=identity,
            host_maddrs=[multiaddress(host, port)],
            announce_maddrs=[multiaddress(announce_host, port)] if announce_host else [])
    except (P2PDaemonError, TimeoutError) as error:
        raise SystemExit(f"covey: the DHT node at {host}:{port} did not start: {str(error) or 'too slow'}") from None
    try:
        yield Node(str(dht.peer_id), [str(address) for address in dht.get_visible_maddrs()],
                   partial(read_records, dht, run_id, timeout=READ_SECONDS), _watch())
    finally:
        _stop(dht)


def _watch() -> Callable[[], bool]:
    # The DHT node, its libp2p daemon and torch's shared memory manager: without the latter two hivemind goes on,
    # as an island or unable to answer.
    children = psutil.Process().children(recursive=True)
    return lambda: all(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


def _stop(dht: DHT) -> None:
    with suppress(OSError):  # it is gone already
        dht.shutdown()
    dht.join(1)
    if dht.is_alive():
        dht.kill()
        dht.join()
