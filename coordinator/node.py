"""The coordinator's DHT node: the swarm's first, always the same peer."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Thread
from time import time
from typing import Any

import psutil
from hivemind.p2p import P2PDaemonError

from averaging.authorisation import MemberAuthoriser
from averaging.ban_records import keep_bans, publish_bans
from averaging.dht import DHT, open_identity, start_dht
from averaging.known_peers import recall_peers, remember_peers
from averaging.progress import publish_record, read_records, record_validators
from averaging.receipt_records import read_receipts
from averaging.receipts import Receipt
from averaging.records import PeerRecord
from coordinator.authority import TOKEN_SECONDS, Authority
from coordinator.ports import multiaddress

NAME = "coordinator"  # in its token
RETURN_SECONDS = 15.0  # within which one of the peers that were there has to answer
START_SECONDS = 15.0  # that libp2p's daemon may take to answer
READ_SECONDS = 2.0  # that one reading of the records may take
RECEIPTS_SECONDS = 3.0  # likewise of the receipts, which are in several places


@dataclass(frozen=True)
class Node:
    """A running node: `read` gives the peers' records or raises, `is_alive` whether all its processes run.

    `remember`: keep these addresses for the next start. A thread keeps the authority's list of bans in the DHT.
    """

    peer_id: str
    addresses: list[str]  # multiaddresses to reach it by
    read: Callable[[], list[PeerRecord]]
    read_receipts: Callable[[], dict[str, tuple[Receipt, ...]]]  # by peer id; or raises
    is_alive: Callable[[], bool]
    publish_bans: Callable[[], None]  # tell the DHT of the authority's list; returns at once
    publish_record: Callable[..., Any]  # averaging.progress's, of this node; returns at once
    remember: Callable[[Iterable[str]], None]
    token: Callable[[], bytes]  # a new one of this node
    daemon: str  # address of libp2p's, for other processes of ours


@contextmanager
def running_node(run_id: str, authority: Authority, folder: Path, *, host: str, announce_host: str | None,
                 port: int) -> Iterator[Node]:
    """A node with the identity in `folder`, a member by `authority`, at the IP address `host`, until the context ends.

    It comes back to the peers that it knew when it last ran; if none of them answers, it is the first node again. Exits
    with status 1 if it does not start.
    """
    identity, known_peers, over = folder / "identity.key", folder / "known_peers.json", Event()
    key = open_identity(identity)

    def token() -> bytes:
        return authority.issue(key.get_public_key().to_bytes(), NAME, time() + TOKEN_SECONDS)

    member = MemberAuthoriser(key, authority=authority.public_key, run_id=run_id, read_token=token,
                              is_banned=authority.ban_file.is_banned)
    start = partial(
        start_dht, record_validators=record_validators(run_id, key, authority.public_key), identity_path=identity,
        authorizer=member, host_maddrs=[multiaddress(host, port)],
        announce_maddrs=[multiaddress(announce_host, port)] if announce_host else [])
    try:
        dht = _among([*recall_peers(known_peers), *_others(authority)], start) or start()
    except (P2PDaemonError, TimeoutError) as error:
        raise SystemExit(f"covey: the DHT node at {host}:{port} did not start: {str(error) or 'too slow'}") from None
    Thread(target=keep_bans, args=(dht, run_id, authority.ban_file, over), name="bans", daemon=True).start()
    try:
        yield Node(str(dht.peer_id), [str(address) for address in dht.get_visible_maddrs()],
                   partial(read_records, dht, run_id, timeout=READ_SECONDS),
                   partial(read_receipts, dht, run_id, timeout=RECEIPTS_SECONDS), _watch(),
                   partial(publish_bans, dht, run_id, authority.ban_file),
                   partial(publish_record, dht, run_id, key), partial(remember_peers, known_peers), token,
                   dht.daemon_address(START_SECONDS))
    finally:
        over.set()
        _stop(dht)


def _others(authority: Authority) -> list[str]:
    """Where the other coordinators' nodes were."""
    return [address for fact in authority.ledger.facts().coordinators.values() for address in fact.addresses.split()]


def _among(peers: list[str], start: Callable[..., DHT]) -> DHT | None:
    """A node that knows these; None if there are none, or none answers."""
    if peers:
        with suppress(P2PDaemonError, TimeoutError, RuntimeError):
            return start(initial_peers=peers, startup_timeout=RETURN_SECONDS)
    return None


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
