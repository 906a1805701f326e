"""Several peers of a real swarm in one test process: each with a DHT node, libp2p's daemon and an averager process."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hivemind.utils import get_dht_time
from processes import until
from torch import Tensor

from averaging.authorisation import Authoriser
from averaging.bulletin import Bulletin
from averaging.config import Averaging
from averaging.dht import open_identity, start_dht
from averaging.progress import record_validators
from averaging.receipt_records import ReceiptBook
from averaging.records import PeerRecord
from averaging.transports.swarm.swarm import Swarm, SwarmMeeting
from averaging.transports.transport import Outcome
from averaging.version import VERSION

RUN = "swarm-test"
FAST = {"target_batch_size": 1000, "target_group_size": 8, "matchmaking_time": 2.0, "averaging_timeout": 5.0,
        "next_chunk_timeout": 1.0, "request_timeout": 1.0, "load_state_timeout": 10.0, "min_refresh_period": 0.1,
        "default_refresh_period": 0.1, "max_refresh_period": 0.5}


class Peer:
    """A volunteer without a trainer: what the worker wires, up to the transport."""

    def __init__(self, path: Path, friends: list["Peer"], *, client_mode: bool = False, auxiliary: bool = False,
                 authoriser: Callable[[Any], Authoriser] | None = None, **options: Any) -> None:
        self.key, self.config = open_identity(path), Averaging(**{**FAST, **options})
        member = authoriser(self.key) if authoriser else None
        self.dht = start_dht(
            identity_path=path, host_maddrs=["/ip4/127.0.0.1/tcp/0"], client_mode=client_mode,
            initial_peers=[str(maddr) for friend in friends for maddr in friend.dht.get_visible_maddrs()],
            record_validators=record_validators(RUN, self.key), **({"authorizer": member} if member else {}))
        record = PeerRecord(
            peer_id=str(self.dht.peer_id), name=path.stem, state="training", epoch=0, samples_accumulated=0,
            samples_total=0, samples_per_second=0.0, loss=None, group_size=0, version=VERSION, device="cpu",
            client_mode=client_mode, auxiliary=auxiliary, time=get_dht_time())
        self.bulletin = Bulletin(self.dht, RUN, self.key, record, self.config)
        self.receipts = ReceiptBook(self.dht, RUN, self.key)
        self.swarm = Swarm(dht=self.dht, run_id=RUN, key=self.key, config=self.config, bulletin=self.bulletin,
                           client_mode=client_mode, auxiliary=auxiliary, authoriser=member, receipts=self.receipts)

    @property
    def id(self) -> str:
        return self.swarm.peer_id

    def close(self) -> None:
        self.swarm.close()
        self.receipts.close()
        self.bulletin.close()
        self.dht.shutdown()


Join = Callable[..., Peer]


@contextmanager
def swarm(folder: Path) -> Iterator[Join]:
    """Joins peers to one swarm, one call each, and takes them down at the end."""
    torch.set_num_threads(1)
    peers: list[Peer] = []

    def join(**options: Any) -> Peer:
        friends = [peer for peer in peers if not peer.bulletin.record.client_mode][:1]
        peers.append(Peer(folder / f"{len(peers)}.key", friends, **options))
        return peers[-1]

    try:
        yield join
    finally:
        for peer in reversed(peers):
            peer.close()


def acquainted(peers: list[Peer]) -> None:
    """Wait until every peer has read the others' records."""
    ids = {peer.id for peer in peers}
    for peer in peers:
        until(lambda peer=peer: ids <= {record.peer_id for record in peer.bulletin.records()}, "records are read", 20)
    enter(peers, 0)


def meet(peer: Peer, tensors: list[Tensor], group: list[Peer], *, weight: float = 1.0, epoch: int = 0,
         kind: str = "gradients", **options: Any) -> SwarmMeeting:
    """Meet at the end of `epoch`, which others should know that this peer is in, by `enter`."""
    return peer.swarm.meet(tensors, weight, kind=kind, epoch=epoch, group=[member.id for member in group], **options)


def enter(peers: list[Peer], epoch: int) -> None:
    """The trainers say that they are in `epoch`: they will come to a meeting at its end."""
    for peer in peers:
        peer.swarm.report(epoch, 0)


def together(meetings: list[SwarmMeeting]) -> list[Outcome]:
    """The outcomes, waited for at the same time."""
    with ThreadPoolExecutor(len(meetings)) as pool:
        return list(pool.map(lambda meeting: meeting.result(), meetings))
