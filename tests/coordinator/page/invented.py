"""An invented swarm with a past, and a coordinator's HTTP over it that can be stopped and started again."""

import asyncio
import math
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from averaging.records import PeerRecord, Refusals, Rounds, RoundSeconds
from coordinator.archive import Archive, Evaluation
from coordinator.credit_ledger import Contribution, Leaderboard
from coordinator.events import Feed
from coordinator.history import History, remember
from coordinator.http import coordinator_app, serve_http
from coordinator.metrics import coordinator_registry
from coordinator.swarm import Counters, Peer, SwarmState
from coordinator.view import About, Seen, swarm_json

NAMES = ("ada", "grace", "hedy-lab", "katherine", "mary", "radia", "lynn-01", "lynn-02", "barbara", "joan")
DEVICES = ("NVIDIA H200", "NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 3060", "cpu")
TARGET = 65536  # samples per epoch
BEAT_SECONDS = 0.2  # between two readings that the page gets


class Site:
    """What the server shows: `state` and `history`, read every BEAT_SECONDS as a coordinator reads them.

    While it is `silent` it sends nothing to the `viewers` that it has.
    """

    def __init__(self, about: About, state: SwarmState, history: History | None = None,
                 archive: Archive | None = None, leaderboard: Leaderboard | None = None) -> None:
        self.about, self.archive, self.leaderboard = about, archive, leaderboard or Leaderboard()
        self.port, self.silent, self.viewers = 0, False, 0
        self.show(state, history)

    def show(self, state: SwarmState, history: History | None = None) -> None:
        """From the next reading on. Without a `history`, that of this one state."""
        self.state, self.history = state, history or (remember(History(), state) if state.time else History())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def served(self) -> Iterator[None]:
        """Answer on `port`, the first time any free one, until the context ends."""
        ready, stop = threading.Event(), threading.Event()
        thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready, stop)))
        thread.start()
        try:
            assert ready.wait(30)
            yield
        finally:
            stop.set()
            thread.join()

    async def _serve(self, ready: threading.Event, stop: threading.Event) -> None:
        feed = Feed(self._newest())
        app = coordinator_app(self._seen, self.about, coordinator_registry(self._seen, self.about),
                              history=lambda: self.history, feed=feed, clock=lambda: self.state.time)
        async with serve_http(app, "127.0.0.1", self.port) as self.port:
            ready.set()
            while not stop.is_set():
                await asyncio.sleep(BEAT_SECONDS)
                self.viewers = feed.viewers
                if not self.silent:
                    feed.publish(self._newest())
            feed.close()

    def _newest(self) -> dict[str, object]:
        return swarm_json(self._seen(), self.about, self.state.time)

    def _seen(self) -> Seen:
        return Seen(self.state, self.archive, self.leaderboard)


def lively(hours: float = 30.0) -> tuple[SwarmState, History]:
    """A swarm of ten after some hours of training, with churn, failed rounds and a short outage."""
    now, chance, steps = time.time(), random.Random(5), 1500
    state, history, averaged, failed, refused = SwarmState(), History(), 0, 0, Refusals()
    for step in range(steps):
        share = step / (steps - 1)
        if 0.55 < share < 0.57:  # the coordinator could not read
            continue
        here = max(2, round(len(NAMES) * (0.35 + 0.65 * min(1, share * 1.4)) - 2.5 * (0.3 < share < 0.36)))
        rough = share > 0.3 and chance.random() < 0.05
        averaged, failed = averaged + here // 2, failed + 2 * rough
        refused = refused.plus({"silent": 2 * rough, "non-finite": int(0.7 < share < 0.72), "forged": int(share == 1)})
        epoch = int(share * 412)
        when = now - (1 - share) * hours * 3600
        group = min(here, 3 + (step // 70 % 7 > 0))
        peers = [_peer(i, epoch, group, when, chance) for i in range(here)]
        state = SwarmState(
            time=when, peers={peer.record.peer_id: peer for peer in peers}, epoch=epoch, joins=23, left=9, lost=4,
            counters=Counters(round(share * 412 * TARGET), Rounds(averaged, failed, alone=min(40, step)),
                              RoundSeconds(2.4 * averaged, 30.0 * failed), refused), since=now - hours * 3600)
        history = remember(history, state)
    return state, history


def kept(now: float, epoch: int = 412) -> Archive:
    """What the archive of such a swarm holds: a checkpoint every 10 epochs, each evaluated."""
    chance = random.Random(7)
    measured = tuple(Evaluation(at, {"knn_accuracy": 0.72 * (1 - math.exp(-at / 120)) + chance.gauss(0.04, 0.006)})
                     for at in range(10, epoch, 10))
    return Archive(epoch=measured[-1].epoch, time=now - 137, sha256="ab" * 32, evaluations=measured)


def credited() -> Leaderboard:
    """What the volunteers of such a swarm are credited with; one of them claimed too much."""
    shares = (0.31, 0.22, 0.17, 0.12, 0.09, 0.06, 0.03)
    rows = [Contribution(f"12D3Koo{i:04d}", NAMES[i], round(share * 390 * TARGET), 390 - 17 * i, 3 * (i == 4))
            for i, share in enumerate(shares)]
    return Leaderboard({row.peer_id: row for row in rows}, sum(row.samples for row in rows), flagged=3)


def _peer(number: int, epoch: int, group: int, when: float, chance: random.Random) -> Peer:
    loss = 6.2 * math.exp(-epoch / 90) + 2.1 + chance.gauss(0, 0.04)
    speed = (90.0, 41.0, 13.0, 0.9)[number % 4] * chance.uniform(0.93, 1.07)
    record = PeerRecord(
        peer_id=f"12D3Koo{number:04d}", name=NAMES[number], state="training", epoch=epoch,
        samples_accumulated=round(speed * 100), samples_total=epoch * 6000, samples_per_second=speed,
        loss=loss if epoch else None, group_size=group, version="0.1.0", device=DEVICES[number % 4],
        client_mode=number % 3 == 2, time=when, sketch=b"",
        round_seconds=1.4 + 0.35 * group + abs(chance.gauss(0, 0.2)), refused=Refusals(absent=number // 3))
    if number == len(NAMES) - 1:
        record = replace(record, state="starting", samples_per_second=0.0, samples_accumulated=0, loss=None,
                         group_size=0, round_seconds=0.0, refused=Refusals())
    return Peer(record, when - chance.uniform(0.5, 6))
