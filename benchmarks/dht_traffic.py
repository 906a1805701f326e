"""`python -m benchmarks.dht_traffic [--nodes 4 8 16 32 64]`: what the DHT carries for each peer as the swarm grows.

Each peer has a DHT node of its own, a process and a libp2p daemon as any volunteer's, with tokens and signatures, on
loopback, and tells and reads by its own Bulletin; only training is a clock: micro-batches, and epochs of equal length
whatever the size of the swarm. Bytes are those of the daemons' TCP connections, both ways, as the kernel counts them
(`ss --tcp --info`): payload with libp2p's encryption and framing, without TCP's and IP's headers.
"""

import averaging.fork  # noqa: F401

# isort: split
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from statistics import fmean, median
from time import monotonic, sleep

import psutil
from hivemind.utils import get_dht_time
from hivemind.utils.crypto import RSAPrivateKey

from averaging.authorisation import MemberAuthoriser, issue_token
from averaging.bulletin import Bulletin
from averaging.config import Averaging
from averaging.dht import DHT, open_identity, start_dht
from averaging.progress import record_validators
from averaging.records import PeerRecord, Rounds
from averaging.version import VERSION
from benchmarks.averaging_tables import print_table, wide_console

RUN_ID = "traffic"
STEP_SECONDS = 0.5  # a micro-batch
SPEED = 64.0  # samples per second, of each peer
LOCAL = "/ip4/127.0.0.1/tcp/0"
COLUMNS = ("peers", "kB a refresh", "received kB/s", "sent kB/s", "hottest node kB/s", "tellings/s",
           "readings/s", "new epoch known after s", "others known", "CPU cores")


class Counted(Bulletin):
    """A bulletin that counts what it asks of the DHT."""

    tellings = readings = 0

    def _tell(self) -> "Future[bool]":
        self.tellings += 1
        return super()._tell()

    def _look(self) -> None:
        self.readings += 1
        super()._look()


@dataclass
class Peer:
    """One of the swarm."""

    dht: DHT
    key: RSAPrivateKey
    bulletin: Counted | None = None

    @property
    def board(self) -> Counted:
        assert self.bulletin is not None
        return self.bulletin

    @property
    def daemon(self) -> int:
        return next(child.pid for child in psutil.Process(self.dht.pid).children() if child.name() == "p2pd")


class Traffic:
    """Bytes (sent, received) by the process id of a daemon since this was made; `look` often: what closed is kept."""

    def __init__(self) -> None:
        self._first = self._connections()
        self._last = dict(self._first)

    def look(self) -> None:
        self._last |= self._connections()

    def of(self, process: int) -> tuple[int, int]:
        pairs = [(now, self._first.get(name, (0, 0))) for name, now in self._last.items() if name[0] == process]
        return sum(now[0] - then[0] for now, then in pairs), sum(now[1] - then[1] for now, then in pairs)

    @staticmethod
    def _connections() -> dict[tuple[int, str], tuple[int, int]]:
        told = subprocess.run(["ss", "-tinpHO"], capture_output=True, text=True, check=True).stdout
        found = {}
        for line in told.splitlines():
            if owner := re.search(r'"p2pd",pid=(\d+)', line):
                sent, received = (int(match[1]) if (match := re.search(rf"\bbytes_{way}:(\d+)", line)) else 0
                                  for way in ("sent", "received"))
                found[int(owner[1]), " ".join(line.split()[3:5])] = sent, received
        return found


@contextmanager
def swarm(count: int, epoch_seconds: float, folder: Path) -> Iterator[list[Peer]]:
    """`count` peers that know of each other by one of them, as newcomers do."""
    authority, peers = RSAPrivateKey(), list[Peer]()
    config = Averaging(target_batch_size=int(count * SPEED * epoch_seconds), target_group_size=8)
    try:
        for number in range(count):
            peers.append(_node(folder / f"{number}.key", authority, peers[:1]))
        for number, peer in enumerate(peers):
            peer.bulletin = Counted(peer.dht, RUN_ID, peer.key, _record(str(peer.dht.peer_id), number), config)
        yield peers
    finally:
        for peer in peers:
            if peer.bulletin:
                peer.bulletin.close(0.1)
        for peer in peers:
            peer.dht.kill()
        for peer in peers:
            peer.dht.shutdown()


def _node(identity: Path, authority: RSAPrivateKey, friends: Sequence[Peer]) -> Peer:
    key, known = open_identity(identity), authority.get_public_key().to_bytes()
    token = issue_token(authority, run_id=RUN_ID, public_key=key.get_public_key().to_bytes(), name=identity.stem,
                        expires=datetime.now(UTC) + timedelta(hours=2))
    member = MemberAuthoriser(key, authority=known, run_id=RUN_ID, read_token=lambda: token)
    return Peer(start_dht(identity_path=identity, host_maddrs=[LOCAL], authorizer=member,
                          record_validators=record_validators(RUN_ID, key, known),
                          initial_peers=[str(at) for one in friends for at in one.dht.get_visible_maddrs()]), key)


def _record(peer_id: str, number: int) -> PeerRecord:
    return PeerRecord(
        peer_id=peer_id, name=f"volunteer-{number:03}", state="training", epoch=0, samples_accumulated=0,
        samples_total=0, samples_per_second=SPEED, loss=2.0, group_size=8, version=VERSION,
        device="NVIDIA GeForce RTX 3090", client_mode=False, time=get_dht_time(), step_seconds=STEP_SECONDS,
        sketch=bytes(136), rounds=Rounds(), addresses=(f"/ip4/198.51.100.7/tcp/31337/p2p/{peer_id}",))


def train(peers: Sequence[Peer], epoch_seconds: float, seconds: float, start: int,
          each_step: Callable[[], None]) -> tuple[int, list[float]]:
    """Micro-batches and epochs, all peers in step; the epoch at the end, and how long each epoch took to be known."""
    began, epoch, known, changed = monotonic(), start, list[float](), None
    while (now := monotonic()) < began + seconds:
        if now >= began + (epoch - start + 1) * epoch_seconds:
            epoch, changed = epoch + 1, now
        into = now - began - (epoch - start) * epoch_seconds
        for peer in peers:
            peer.board.update(epoch=epoch, samples_accumulated=int(into * SPEED), samples_per_second=SPEED,
                              samples_total=int((now - began) * SPEED), rounds=Rounds(averaged=epoch),
                              sketch=epoch.to_bytes(8, "big") * 17)
        each_step()
        waiting = now + STEP_SECONDS
        while monotonic() < waiting:
            if changed and all(_knows(peer, epoch) for peer in peers):
                known.append(monotonic() - changed)
                changed = None
            sleep(0.05)
    return epoch, known


def _knows(peer: Peer, epoch: int) -> bool:
    records = peer.board.records()
    return 10 * sum(record.epoch >= epoch for record in records) >= 9 * len(records)


def measure(count: int, epoch_seconds: float, seconds: float) -> list[str]:
    """A row of the table."""
    with tempfile.TemporaryDirectory(prefix="covey-dht-") as name, swarm(count, epoch_seconds, Path(name)) as peers:
        busy = [psutil.Process(process) for peer in peers for process in (peer.dht.pid, peer.daemon)]
        epoch, _ = train(peers, epoch_seconds, 2 * epoch_seconds, 0, lambda: None)
        traffic, before = Traffic(), [(peer.board.tellings, peer.board.readings) for peer in peers]
        began, worked = monotonic(), _cpu(busy)
        _, known = train(peers, epoch_seconds, seconds, epoch, traffic.look)
        traffic.look()
        took = monotonic() - began
        return [*_row(peers, [traffic.of(peer.daemon) for peer in peers], before, took),
                f"{median(known):.1f} (worst {max(known):.1f})" if known else "never",
                f"{fmean(len(peer.board.records()) for peer in peers):.1f}", f"{(_cpu(busy) - worked) / took:.2f}"]


def _cpu(processes: Sequence[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def _row(peers: Sequence[Peer], carried: Sequence[tuple[int, int]], before: Sequence[tuple[int, int]],
         seconds: float) -> list[str]:
    after = [(peer.board.tellings, peer.board.readings) for peer in peers]
    tellings, readings = (sum(now[kind] - then[kind] for now, then in zip(after, before, strict=True))
                          for kind in (0, 1))
    sent, received = (sum(pair[way] for pair in carried) / 1e3 for way in (0, 1))
    hottest = max(sum(pair) for pair in carried) / 1e3
    return [str(len(peers)), f"{received / max(1, tellings + readings):.1f}", f"{received / len(peers) / seconds:.1f}",
            f"{sent / len(peers) / seconds:.1f}", f"{hottest / seconds:.1f}",
            *(f"{times / len(peers) / seconds:.2f}" for times in (tellings, readings))]


def main() -> None:
    """Print the curve, a row as soon as it is there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--epoch", type=float, default=15.0, metavar="SECONDS")
    parser.add_argument("--seconds", type=float, default=45.0, help="that each size is measured, after two epochs")
    parser.add_argument("--json", action="store_true", help="a row at once, for programs; of one size")
    arguments = parser.parse_args()
    if arguments.json:
        print(json.dumps(measure(arguments.nodes[0], arguments.epoch, arguments.seconds)), flush=True)
        return
    rows, console = [], wide_console()
    for count in arguments.nodes:  # each in a process of its own: it forks, and must not have threads by then
        told = subprocess.run(
            [sys.executable, "-m", "benchmarks.dht_traffic", "--json", "--nodes", str(count), "--epoch",
             str(arguments.epoch), "--seconds", str(arguments.seconds)], check=True, stdout=subprocess.PIPE, text=True)
        rows.append([*json.loads(told.stdout), f"{os.getloadavg()[0]:.0f}"])
        print(dict(zip((*COLUMNS, "load average"), rows[-1], strict=True)), flush=True)
    print_table(console, f"The DHT's traffic per peer, {date.today()}, {os.cpu_count()} cores, epochs of "
                f"{arguments.epoch:g} s", (*COLUMNS, "load average"), rows)


if __name__ == "__main__":
    main()
