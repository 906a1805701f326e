"""A swarm that "trains" synthetic gradients, ours or stock hivemind's, and what each of its peers saw.

A micro-batch is a timed wait: it stands for the work of a GPU of the peer's own, so that computing takes no processor
time, and peers that share two cores do not slow each other's. All else is real: gradients of the stated size, their
accumulation, averaging and the updates.

Peer i's gradient is 1 in column i of every row and 0 elsewhere: a row of an averaged gradient says whose gradients are
in it, and with which share.
"""

import averaging.fork  # noqa: F401

# isort: split
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from threading import Lock, Thread
from time import monotonic, sleep
from typing import Any

import psutil
import torch
from hivemind.utils import get_dht_time
from torch import Tensor

from averaging.bulletin import Bulletin
from averaging.config import Averaging
from averaging.dht import open_identity
from averaging.progress import record_validators
from averaging.records import PeerRecord
from averaging.strategies.open import open_strategy
from averaging.transports.swarm.swarm import Swarm
from averaging.version import VERSION
from benchmarks.averaging_peers import Child, Place, forked, introduce, start_node
from benchmarks.averaging_seen import WARM_UP_EPOCHS, Seen, Step, Track, Update
from benchmarks.stock_hivemind import TRACKER, StockHivemind
from training.optimizers.build import initialise_state

STOCK = "stock hivemind"
COLUMNS = 4  # of every parameter: as many as there are peers at most
RUN_ID = "bench"


@dataclass(frozen=True)
class Case:
    """A swarm that is measured."""

    side: str                    # STOCK, or the strategy of ours
    peers: int
    values: int = 1 << 18        # float32, of all parameters together
    tensors: int = 64
    micro_batch_seconds: float = 0.1
    micro_batches: int = 8       # of each peer in a collaborative epoch, one sample each
    options: dict[str, Any] = field(default_factory=dict)  # of ours: of averaging.*; of stock: StockHivemind's


def run(case: Case, epochs: int, *, noting: bool = False, seconds: float = 60.0) -> Seen:
    """A swarm that runs until all peers have ended WARM_UP_EPOCHS and `epochs` more; fewer, after `seconds`.

    `noting`: what updates are made of, too.
    """
    with forked(case.peers, _live, case, noting) as children:
        introduce(children)
        for child in children:
            child.pipe.send("go")
        reached = _await_epoch(children, WARM_UP_EPOCHS + epochs, seconds)
        for child in children:
            child.pipe.send("stop")
        tracks = [_track(child) for child in children]
    if reached <= WARM_UP_EPOCHS:
        raise SystemExit(f"{reached} epochs ended in {seconds:.0f} s: {case}")
    return Seen(tracks, reached - WARM_UP_EPOCHS)


def _await_epoch(children: Sequence[Child], epoch: int, seconds: float) -> int:
    """The epoch that all peers have reached: `epoch`, or what it is after `seconds`."""
    reached, deadline = [0] * len(children), monotonic() + seconds
    while min(reached) < epoch and monotonic() < deadline:
        ready = wait([child.pipe for child in children], timeout=deadline - monotonic())
        for number, child in enumerate(children):
            if child.pipe in ready:
                reached[number] = child.hear()
    return min(epoch, *reached)


def _track(child: Child) -> Track:
    while not isinstance(said := child.hear(), Track):
        pass
    return said


def _live(place: Place, case: Case, noting: bool) -> None:
    track, params = Track(), parameters(case)
    stepper, tell = (_stock if case.side == STOCK else _ours)(place, case, params, track, noting)
    grads, sending = gradients(params, place.number), Lock()
    place.pipe.send("ready")
    place.pipe.recv()
    Thread(target=_tell_when_stopped, args=(place.pipe, track, sending), daemon=True).start()
    while True:
        sleep(case.micro_batch_seconds)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        entered = monotonic()
        progress = stepper.step(1)
        track.steps.append(Step(entered, monotonic(), progress.epoch))
        tell()
        if progress.updated:
            track.loopback[progress.epoch] = loopback_bytes()
            with sending:
                place.pipe.send(progress.epoch)


def _tell_when_stopped(pipe: "Connection[Any, Any]", track: Track, sending: Lock) -> None:
    """A thread's work: the other may be in the midst of a round that stalls."""
    pipe.recv()
    with sending:
        pipe.send(Track(list(track.steps), list(track.rounds), list(track.loads), list(track.updates),
                        dict(track.loopback)))
    pipe.recv()  # until it is killed


def loopback_bytes() -> int:
    """That this machine's loopback device has carried, headers and all."""
    return sum(device.bytes_sent for name, device in psutil.net_io_counters(pernic=True).items()
               if name.startswith("lo"))


def _stock(place: Place, case: Case, params: list[Tensor], track: Track,
           noting: bool) -> tuple[Any, Callable[[], None]]:
    stepper = StockHivemind(
        dht=start_node(place), run_id=RUN_ID, params=params, peers=case.peers,
        target_batch_size=case.peers * case.micro_batches, on_round=track.rounds.append,
        on_state_load=track.loads.append, **case.options,
        # it counts up before it steps
        optimizer=lambda groups: sgd(groups, track.updates if noting else None, lambda: stepper.epoch - 1))
    return stepper, lambda: None


def _ours(place: Place, case: Case, params: list[Tensor], track: Track,
          noting: bool) -> tuple[Any, Callable[[], None]]:
    bulletin, swarm, config = join(place, Averaging(
        strategy=case.side, target_batch_size=case.peers * case.micro_batches,
        **TRACKER | {"target_group_size": case.peers} | case.options))
    optimizer = sgd(params, track.updates if noting else None, lambda: stepper.epoch)
    stepper = open_strategy(config, transport=swarm, optimizer=optimizer, on_round=track.rounds.append,
                            on_state_load=track.loads.append)
    recent_samples = recent_seconds = 0.0
    before = monotonic()

    def tell() -> None:  # as the training loop's telemetry does
        nonlocal recent_samples, recent_seconds, before
        before, took = monotonic(), monotonic() - before
        recent_samples, recent_seconds = 0.9 * recent_samples + 1, 0.9 * recent_seconds + took
        bulletin.update(samples_per_second=recent_samples / recent_seconds)

    return stepper, tell


def join(place: Place, config: Averaging) -> tuple[Bulletin, Swarm, Averaging]:
    """In a child: what a worker wires, up to the transport."""
    key = open_identity(place.identity)
    dht = start_node(place, record_validators(RUN_ID, key))
    bulletin = Bulletin(dht, RUN_ID, key, PeerRecord(
        peer_id=str(dht.peer_id), name=str(place.number), state="training", epoch=0, samples_accumulated=0,
        samples_total=0, samples_per_second=0.0, loss=None, group_size=0, version=VERSION, device="cpu",
        client_mode=False, time=get_dht_time()), config)
    return bulletin, Swarm(dht=dht, run_id=RUN_ID, key=key, config=config, bulletin=bulletin), config


def parameters(case: Case) -> list[Tensor]:
    """[rows, COLUMNS] each, float32, zero."""
    rows = case.values // (case.tensors * COLUMNS)
    return [torch.zeros(rows, COLUMNS, requires_grad=True) for _ in range(case.tensors)]


def gradients(params: Sequence[Tensor], peer: int) -> list[Tensor]:
    """Peer `peer`'s, always the same."""
    made = [torch.zeros_like(param, requires_grad=False) for param in params]
    for grad in made:
        grad[:, peer] = 1.0
    return made


def sgd(params: Any, updates: list[Update] | None = None, epoch: Callable[[], int] = lambda: 0) -> torch.optim.SGD:
    """SGD with momentum, its state initialised, which notes in `updates` what it steps with."""
    optimizer = torch.optim.SGD(params, lr=1e-3, momentum=0.9)
    initialise_state(optimizer)

    def note(*_: object) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        lowest = torch.stack([grad.amin(0) for grad in grads]).amin(0)
        highest = torch.stack([grad.amax(0) for grad in grads]).amax(0)
        assert updates is not None
        updates.append(Update(epoch(), tuple(lowest.tolist()), tuple(highest.tolist())))

    if updates is not None:
        optimizer.register_step_pre_hook(note)
    return optimizer
