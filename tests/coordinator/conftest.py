"""Records of an invented swarm, and the coordinator's surfaces over them."""

from collections.abc import Callable
from dataclasses import replace

import hypothesis
import pytest

from averaging.records import PeerRecord, Refusals, Rounds, RoundSeconds
from coordinator.swarm import Peer, SwarmState
from coordinator.view import About

hypothesis.settings.register_profile("covey", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile("covey")

NOW = 1_700_000_000.0


@pytest.fixture(scope="session")
def record() -> Callable[..., PeerRecord]:
    """`record("ada", epoch=3, ...)`: a healthy training peer's record, written at NOW."""
    healthy = PeerRecord(
        peer_id="", name="", state="training", epoch=0, samples_accumulated=0, samples_total=0,
        samples_per_second=1.0, loss=None, group_size=0, version="0.1.0", device="cpu", client_mode=False, time=NOW)
    return lambda peer_id, **changes: replace(healthy, **{"peer_id": peer_id, "name": peer_id, **changes})


@pytest.fixture(scope="session")
def about() -> About:
    return About(run_id="tiny-0123456789ab", link="covey://127.0.0.1:31338/tiny-0123456789ab", version="0.1.0",
                 target_batch_size=256, target_group_size=2, averaged="gradients")


@pytest.fixture
def state(record: Callable[..., PeerRecord]) -> SwarmState:
    """Two peers at NOW, one of whom volunteers as a script."""
    rounds = Rounds(averaged=5, failed=1, alone=2)
    seconds, refused = RoundSeconds(averaged=12.5, failed=30.0), Refusals(value=3, absent=1)
    ada = record("12D3ada", name="ada", epoch=7, samples_accumulated=64, samples_total=1000, samples_per_second=30.0,
                 loss=2.0, group_size=2, rounds=rounds, round_seconds=2.5, seconds=seconds, refused=refused)
    eve = record("12D3eve", name="<script>alert(1)</script>", state="starting", client_mode=True,
                 samples_per_second=10.0, loss=4.0)
    peers = {peer.peer_id: Peer(peer, NOW - 3) for peer in (ada, eve)}
    empty = SwarmState()
    counters = replace(empty.counters, samples=1500, rounds=rounds, seconds=seconds, refused=refused)
    return SwarmState(time=NOW, peers=peers, counters=counters, joins=6, left=3, lost=1, epoch=7, since=NOW - 9000)


@pytest.fixture(scope="session")
def now() -> float:
    return NOW
