"""Peers that fail on purpose: each a real process with a DHT node, libp2p's daemon, an averager and a trainer.

They are forked from multiprocessing's fork server, which has imported torch and hivemind: that takes milliseconds where
a new interpreter takes seconds. A peer and its children are a process group, so that all of it can be killed or stopped
at once, as a machine's would; it does not outlive the fork server, nor that one the test. What a peer does it says in
lines of JSON, the averager too, with the time by the clock that all processes share.
"""

import averaging.fork  # noqa: F401

# isort: split
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import psutil
import torch
from fault_points import Fault, Faults, inject
from hivemind.utils import MPFuture, get_dht_time
from network import Network, leave_network
from processes import until
from torch import Tensor, nn

from averaging.bulletin import Bulletin
from averaging.config import Averaging
from averaging.dht import open_identity, start_dht
from averaging.process import die_with_parent
from averaging.progress import record_validators
from averaging.records import PeerRecord
from averaging.runtime import remove_libp2p_sockets
from averaging.strategies.open import open_strategy
from averaging.transports.swarm.swarm import Swarm
from averaging.transports.transport import Outcome
from averaging.version import VERSION

RUN = "faulty-swarm"
BATCH = 8              # samples of a micro-batch
PACE_SECONDS = 0.05    # that one takes: on this model it would be nothing
STEPS = 6              # micro-batches of each peer in an epoch
PEERS = 4
OPTIONS: dict[str, Any] = {
    "target_batch_size": PEERS * STEPS * BATCH, "target_group_size": 8, "averaging_timeout": 3.0,
    "min_refresh_period": 0.1, "default_refresh_period": 0.1, "max_refresh_period": 0.5,
    "report_progress_expiration": 5.0, "load_state_timeout": 10.0}
PRELOADED = ["averaging.fork", "torch", "hivemind", "psutil", "averaging.strategies.collaborative",
             "averaging.strategies.local_sgd", "averaging.strategies.gossip", "averaging.transports.swarm.swarm"]
START_SECONDS = 60.0
VIEWS = 3              # random directions that a tensor's values are looked at from


# -- in a peer's process --


@dataclass(frozen=True)
class Place:
    """What a peer's process is given."""

    number: int
    folder: Path
    initial_peers: tuple[str, ...]
    options: dict[str, Any]
    trains: bool = True                  # else it is but a DHT node, as the coordinator is for the swarm
    host: str = "127.0.0.1"
    is_apart: bool = False               # in a network namespace, which its Herd cables

    @property
    def identity(self) -> Path:
        return self.folder / f"{self.number}.key"

    @property
    def fault(self) -> Path:
        return self.folder / f"{self.number}.fault"


def live(place: Place, words: Any, orders: Any) -> None:
    """A peer's life. `words`: a pipe that it speaks to; `orders`: one that it is told to train by."""
    os.setpgid(0, 0)
    die_with_parent()
    with (place.folder / f"{place.number}.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s",
                        datefmt="%H:%M:%S", force=True)
    tempfile.tempdir = str(place.folder)
    torch.set_num_threads(1)
    MPFuture.reset_backend()  # its locks are the fork server's: who is stopped while it holds one would stop all peers
    try:
        _take_part(place, partial(_say, words.fileno()), orders)
        status = 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)  # hivemind's threads would be waited for


def _say(pipe: int, **what: Any) -> None:
    line = json.dumps({**what, "time": monotonic()}).encode() + b"\n"
    assert len(line) < 4096, "a longer one would mix with another process's"
    os.write(pipe, line)


def _take_part(place: Place, say: Callable[..., None], orders: Any) -> None:
    if place.is_apart:
        leave_network()
        say(apart=os.getpid())
        orders.recv()
    leave = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: leave.set())
    key, config = open_identity(place.identity), Averaging(**place.options)
    dht = start_dht(identity_path=place.identity, host_maddrs=[f"/ip4/{place.host}/tcp/0"],
                    initial_peers=place.initial_peers, record_validators=record_validators(RUN, key))
    addresses = [str(address) for address in dht.get_visible_maddrs()]
    if not place.trains:
        say(ready=str(dht.peer_id), addresses=addresses)
        leave.wait()
        dht.shutdown()
        return
    bulletin = Bulletin(dht, RUN, key, PeerRecord(
        peer_id=str(dht.peer_id), name=str(place.number), state="starting", epoch=0, samples_accumulated=0,
        samples_total=0, samples_per_second=BATCH / PACE_SECONDS, loss=None, group_size=0, version=VERSION,
        device="cpu", client_mode=False, time=get_dht_time()), config)
    faults = Faults(place.fault, say)
    inject(faults)
    swarm = Swarm(dht=dht, run_id=RUN, key=key, config=config, bulletin=bulletin)
    say(ready=swarm.peer_id, addresses=addresses)
    orders.recv()
    _train(config, Witness(swarm, say), bulletin, faults, leave)
    swarm.close()
    bulletin.close()
    dht.shutdown()


class Witness:
    """A Swarm that tells what goes into a meeting, and what comes out: as seen from a few random directions.

    A mean's view is the mean of the views, whatever the tensors' size.
    """

    def __init__(self, swarm: Swarm, say: Callable[..., None]) -> None:
        self._swarm, self.say = swarm, say

    def __getattr__(self, name: str) -> Any:
        return getattr(self._swarm, name)

    def meet(self, tensors: Sequence[Tensor], weight: float, *, kind: str, epoch: int, buffers: Sequence[Tensor] = (),
             state: Sequence[Tensor] = (), **options: Any) -> "WitnessedMeeting":
        values = [*tensors, *buffers]
        self.say(met=epoch, kind=kind, weight=weight, values=views(values), state=views(state))
        meeting = self._swarm.meet(tensors, weight, kind=kind, epoch=epoch, buffers=buffers, state=state, **options)
        return WitnessedMeeting(meeting, lambda outcome: self.say(
            parted=epoch, kind=kind, averaged=outcome.averaged, members=outcome.members, reason=outcome.reason,
            with_state=outcome.with_state, seconds=outcome.seconds, refused=dict(outcome.refused),
            values=views(values), state=views(state)))


@dataclass
class WitnessedMeeting:
    """Tells of its result, once."""

    meeting: Any
    tell: Callable[[Outcome], None] | None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.meeting, name)

    def result(self) -> Outcome:
        outcome = self.meeting.result()
        if self.tell:
            self.tell(outcome)
            self.tell = None
        return outcome


def views(tensors: Sequence[Tensor]) -> list[float]:
    """Of all values together, along random directions that are equal for all peers."""
    if not tensors:
        return []
    values = torch.cat([tensor.detach().flatten().double() for tensor in tensors])
    signs = torch.randint(0, 2, (VIEWS, len(values)), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    return ((2 * signs - 1).double() @ values).tolist()


def network() -> nn.Module:
    """Large enough that every peer reduces several chunks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 256))


def _train(config: Averaging, transport: Witness, bulletin: Bulletin, faults: Faults, leave: threading.Event) -> None:
    say, net, draws = transport.say, network(), torch.Generator().manual_seed(int(bulletin.record.name))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    stepper = open_strategy(
        config, transport=transport, optimizer=optimizer, shared_buffers=net.buffers(),
        on_round=lambda end: say(round=end.epoch, outcome=end.outcome, group_size=end.group_size, seconds=end.seconds,
                                 reason=end.reason, refused=dict(end.refused)),
        on_state_load=lambda load: say(loaded=load.epoch, succeeded=load.succeeded, seconds=load.seconds))
    stepper.resume(0)
    bulletin.update(state="training")
    epoch = stepper.epoch
    say(epoch=epoch, checksum=checksum(net, optimizer))
    while not leave.is_set():
        faults.reach(epoch, "computing")
        time.sleep(PACE_SECONDS)
        inputs = torch.randn(BATCH, 512, generator=draws)
        loss = (net(inputs) - torch.tanh(inputs[:, :256])).square().mean()
        if fault := faults.armed(epoch, "gradient"):
            faults.fire(fault)
            loss = loss * torch.nan
        loss.backward()
        stepper.step(BATCH)
        if stepper.epoch != epoch:
            epoch = stepper.epoch
            say(epoch=epoch, checksum=checksum(net, optimizer))
    bulletin.update(state="leaving")
    stepper.close()
    say(left=epoch)


def checksum(net: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Of parameters, BatchNorm's statistics and momentum, to the bit."""
    digest = hashlib.sha256()
    for tensor in [*net.parameters(), *net.buffers(), *(optimizer.state[p]["momentum_buffer"]
                                                       for p in net.parameters())]:
        if tensor.is_floating_point():
            digest.update(tensor.detach().numpy().data)
    return digest.hexdigest()[:16]


# -- in the test's process --


@dataclass
class Peer:
    """A peer, as the test sees it."""

    place: Place
    process: Any
    orders: Any
    words: list[dict[str, Any]] = field(default_factory=list)
    id: str = ""
    addresses: tuple[str, ...] = ()

    def follow(self, pipe: Any) -> None:
        """Take down what it says, until it and all its children are gone."""
        with suppress(OSError), os.fdopen(os.dup(pipe.fileno())) as lines:
            for line in lines:
                self.words.append(json.loads(line))

    def said(self, word: str, **fields: Any) -> list[dict[str, Any]]:
        """What it has said of this, oldest first."""
        return [said for said in tuple(self.words) if word in said
                and all(said.get(name) == value for name, value in fields.items())]

    def await_ready(self) -> None:
        until(lambda: self.said("ready") or not self.process.is_alive(), f"peer {self.place.number} is ready",
              START_SECONDS)
        assert self.said("ready"), self.log()
        ready = self.said("ready")[0]
        self.id, self.addresses = ready["ready"], tuple(ready["addresses"])

    def log(self) -> str:
        return (self.place.folder / f"{self.place.number}.log").read_text()[-3000:]

    @property
    def epoch(self) -> int:
        """Updates that it has made; -1: it does not train yet."""
        said = self.said("epoch")
        return said[-1]["epoch"] if said else -1

    def checksum(self, epoch: int) -> str | None:
        """As it began `epoch`; None if it did not, or passed over it."""
        return next((said["checksum"] for said in self.said("checksum", epoch=epoch)), None)

    def arm(self, fault: Fault) -> None:
        Faults(self.place.fault, lambda **_: None).arm(fault)

    @property
    def fired(self) -> dict[str, Any] | None:
        """When and where its last fault struck."""
        return (self.said("fired") or [None])[-1]

    def signal(self, number: int) -> None:
        """To all its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def processes(self) -> list[int]:
        """Of its group, those that run or are stopped."""
        return [pid for pid in psutil.pids() if _is_of(pid, self.process.pid)]

    def end(self) -> None:
        """Kill what there is of it."""
        self.signal(signal.SIGKILL)
        self.process.join(10)
        until(lambda: not self.processes(), f"nothing of peer {self.place.number} runs", 15)
        remove_libp2p_sockets(self.place.identity)


def _is_of(pid: int, group: int) -> bool:
    with suppress(ProcessLookupError, psutil.NoSuchProcess):
        return os.getpgid(pid) == group and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def _brief(said: dict[str, Any]) -> str:
    return ", ".join(f"{name} {[member[-4:] for member in value] if name == 'members' else value}"
                     for name, value in said.items() if name not in ("time", "values", "state", "kind"))


class Herd:
    """Peers of one swarm, and a bootstrap node that trains nothing, as the coordinator is for the DHT."""

    def __init__(self, folder: Path, network: Network | None = None) -> None:
        self._folder, self._network = folder, network
        self.peers: list[Peer] = []   # that train, or should
        self._spare: Peer | None = None
        self._all: list[Peer] = []
        self.bootstrap = self._fork(trains=False)
        self.bootstrap.await_ready()

    def train(self, count: int) -> list[Peer]:
        """So many peers that are in step with each other; the dead ones are replaced."""
        self.peers = [peer for peer in self.peers if peer.processes()]
        missing = count - len(self.peers)
        spares = [self._spare] * bool(self._spare and missing > 0)
        self._spare = None if spares else self._spare
        new = [*spares, *(self._fork() for _ in range(missing - len(spares)))]
        for peer in new:
            peer.await_ready()
        for peer in new:
            peer.orders.send("train")
        self.peers += new
        self.await_step()
        return self.peers

    def spare(self) -> None:
        """Have a peer ready that `train` may take."""
        self._spare = self._spare or self._fork()

    def await_step(self, seconds: float = 30.0) -> int:
        """Wait until all peers end an epoch together, from now on; it."""
        since = max([0, *(peer.epoch for peer in self.peers)])
        until(lambda: self._common(since), f"all {len(self.peers)} end an epoch together", seconds)
        return self._common(since)

    def _common(self, since: int) -> int:
        """An epoch after `since` that began with equal parameters on all, after a round of all; 0: none."""
        met = set.intersection(*({said["round"] + 1 for said in peer.said("round", group_size=len(self.peers))}
                                 for peer in self.peers)) if len(self.peers) > 1 else set()
        equal = [epoch for epoch in met if epoch > since
                 and len({peer.checksum(epoch) for peer in self.peers} | {None}) == 2]
        return max(equal, default=0)

    def describe(self, since: float = 0.0) -> str:
        """What everybody has said, but for views."""
        return "\n".join(
            f"{said['time'] - since:7.2f} {peer.place.number} {peer.id[-4:]} {_brief(said)}" for said, peer in sorted(
                ((said, peer) for peer in self._all for said in tuple(peer.words) if said["time"] > since),
                key=lambda found: found[0]["time"]))

    def leader(self, epoch: int, kind: str = "gradients") -> Peer:
        """Who leads the round at the end of `epoch` in its first attempt, by averaging/round.py's rule."""
        return min(self.peers, key=lambda peer: hashlib.sha256(f"{kind}/{epoch}/0/{peer.id}".encode()).digest())

    def cutting(self, peer: Peer) -> tuple[str, ...]:
        """The command that cuts its cable."""
        assert self._network
        return self._network.cutting(peer.place.number)

    def mend(self, peer: Peer) -> None:
        """Its cable."""
        assert self._network
        self._network.mend(peer.place.number)

    def _fork(self, trains: bool = True) -> Peer:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        number = len(self._all)
        bootstrap = self._all[0].addresses if self._all else ()
        known = bootstrap if self._all and self.bootstrap.processes() else tuple(
            address for peer in self.peers for address in peer.addresses)
        host = self._network.address(number) if self._network else "127.0.0.1"
        place = Place(number, self._folder, known, OPTIONS, trains, host, is_apart=self._network is not None)
        (hears, words), (orders, obeys) = context.Pipe(duplex=False), context.Pipe(duplex=False)[::-1]
        process = context.Process(target=live, args=(place, words, obeys), name=f"peer {number}")
        process.start()
        words.close()
        obeys.close()
        peer = Peer(place, process, orders)
        threading.Thread(target=peer.follow, args=(hears,), daemon=True).start()
        self._all.append(peer)
        if self._network:
            until(lambda: peer.said("apart"), f"peer {number} has left the network", START_SECONDS)
            self._network.connect(number, process.pid)
            orders.send("connected")
        return peer

    def close(self) -> None:
        """Nothing of it runs afterwards."""
        for peer in self._all:
            peer.signal(signal.SIGKILL)
        for peer in reversed(self._all):
            peer.end()


@contextmanager
def herd(folder: Path, network: Network | None = None) -> Iterator[Herd]:
    """A swarm that ends with the context; in `network`, each peer with a cable of its own, or on loopback."""
    owned = Herd(folder, network)
    try:
        yield owned
    finally:
        owned.close()
