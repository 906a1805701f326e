"""The collaborative strategy on real hivemind: DHT, libp2p and averagers, several peers in this one process."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from processes import until
from torch import nn

from averaging.config import Averaging
from averaging.dht import DHT, open_identity, start_dht
from averaging.progress import record_validators
from averaging.strategies.collaborative import Collaborative
from averaging.transports.swarm import Round, StateAverager
from training.loop import LocalStepper
from training.optimizers.build import build_optimizer, initialise_state
from training.optimizers.config import Optimizer
from training.optimizers.groups import parameter_groups

BATCH = 8
SGD = Optimizer(lr=0.1, momentum=0.9, weight_decay=0.01, regularize_bn=False, max_epochs=100)
FAST = {"matchmaking_time": 1.0, "averaging_timeout": 10.0, "next_chunk_timeout": 2.0, "request_timeout": 1.0,
        "min_refresh_period": 0.1, "default_refresh_period": 0.2, "max_refresh_period": 0.5}


class Peer:
    """A volunteer without its data: a small network with BatchNorm, stepped by hand."""

    def __init__(self, path: Path, run_id: str, friends: list["Peer"], *,
                 memory_format: torch.memory_format = torch.contiguous_format, **options: object) -> None:
        torch.manual_seed(0)
        self.key = open_identity(path)
        self.dht: DHT = start_dht(
            identity_path=path, host_maddrs=["/ip4/127.0.0.1/tcp/0"],
            record_validators=record_validators(run_id, self.key),
            initial_peers=[str(maddr) for friend in friends for maddr in friend.dht.get_visible_maddrs()])
        self.net = network().to(memory_format=memory_format)
        self.rounds: list[Round] = []
        self.loads: list[object] = []
        self.stepper = Collaborative(
            dht=self.dht, run_id=run_id, key=self.key, config=Averaging(**{**FAST, **options}),
            parameters=parameter_groups(SGD, self.net), optimizer=optimizer, shared_buffers=self.net.buffers(),
            on_round=self.rounds.append, on_state_load=self.loads.append)

    def backward(self, batch: torch.Tensor) -> None:
        self.net(batch).square().mean().backward()

    def close(self) -> None:
        self.stepper.close()
        self.dht.shutdown()


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Unflatten(1, (2, 1, 3)), nn.Conv2d(2, 10, (1, 3)), nn.BatchNorm2d(10, momentum=0.5),
                         nn.ReLU(), nn.Flatten(), nn.Linear(10, 3))


def optimizer(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    made = build_optimizer(SGD, groups)
    initialise_state(made)
    return made


def micro_batches(peer: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + peer)
    return [torch.randn(BATCH, 6, generator=generator) for _ in range(count)]


def endless(peer: int) -> Iterator[torch.Tensor]:
    while True:
        yield from micro_batches(peer, 50)


Swarm = Callable[..., Peer]


@pytest.fixture
def join(tmp_path: Path) -> Iterator[Swarm]:
    """Joins peers to one swarm, one call each, and takes them down afterwards."""
    torch.set_num_threads(1)
    peers: list[Peer] = []

    def join(**options: object) -> Peer:
        options = {"target_batch_size": 6 * BATCH, "target_group_size": 2} | options
        peers.append(Peer(tmp_path / f"{len(peers)}.key", "swarm", peers[:1], **options))
        return peers[-1]

    yield join
    for peer in reversed(peers):
        peer.close()


def contribute(peer: Peer, number: int, companions: int = 1) -> list[torch.Tensor]:
    """Step until the epoch ends, from the second step on in company; the micro-batches that went into it."""
    given: list[torch.Tensor] = []
    for batch in endless(number):
        if len(given) == 1:
            until(lambda: peer.stepper.swarm_peers > companions, "company")
        peer.backward(batch)
        given.append(batch)
        if peer.stepper.step(BATCH).updated:
            peer.stepper.settle()
            return given
        assert len(given) < 1000, "the epoch never ended"
    raise AssertionError


def together(peers: list[Peer]) -> list[torch.Tensor]:
    """One epoch of all peers at once; all that went into it."""
    with ThreadPoolExecutor(len(peers)) as pool:
        shares = pool.map(lambda number: contribute(peers[number], number, len(peers) - 1), range(len(peers)))
        return [batch for share in shares for batch in share]


def in_one_process(batches: list[torch.Tensor]) -> nn.Module:
    net = network()
    stepper = LocalStepper(optimizer(parameter_groups(SGD, net)), target_batch_size=len(batches) * BATCH)
    for batch in batches:
        net(batch).square().mean().backward()
        stepper.step(BATCH)
    return net


def test_two_peers_end_an_epoch_with_the_weights_of_one_process(join: Swarm) -> None:
    peers = [join(), join()]
    expected = in_one_process(together(peers))
    for peer in peers:
        assert [(r.kind, r.outcome, r.group_size) for r in peer.rounds] == [
            ("gradients", "averaged", 2), ("state", "averaged", 2)]
        for ours, theirs in zip(peer.net.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_all_members_end_an_epoch_with_the_same_bits(join: Swarm) -> None:
    peers = [join(target_group_size=3), join(target_group_size=3), join(target_group_size=3)]
    together(peers)
    first, *others = [list(peer.net.parameters()) + list(peer.net.buffers())[:2] for peer in peers]
    for other in others:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, other, strict=True))


def test_peers_whose_parameters_lie_differently_in_memory_average_all_the_same(join: Swarm) -> None:
    ours, theirs = join(memory_format=torch.channels_last), join()
    assert not ours.net[1].weight.is_contiguous()
    expected = in_one_process(together([ours, theirs]))
    late = join(memory_format=torch.channels_last)
    until(lambda: late.stepper.swarm_peers > 0, "word of the swarm")
    late.backward(next(endless(2)))
    late.stepper.step(BATCH)
    for averaged, others, downloaded, wanted in zip(
            *(peer.net.parameters() for peer in (ours, theirs, late)), expected.parameters(), strict=True):
        assert torch.equal(averaged, others)
        assert torch.equal(downloaded, others)
        torch.testing.assert_close(averaged, wanted, rtol=1e-5, atol=1e-6)


def test_batchnorms_statistics_are_averaged(join: Swarm) -> None:
    peers = [join(), join()]
    together(peers)
    (ours, theirs) = [peer.net[2].running_var for peer in peers]
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, torch.ones(10))


def test_a_peer_alone_trains_like_one_process(join: Swarm) -> None:
    peer = join()
    expected = in_one_process(contribute(peer, 0, companions=-1))
    for ours, theirs in zip(peer.net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert [(r.kind, r.outcome) for r in peer.rounds] == [("gradients", "alone")]


def test_a_late_joiner_takes_over_parameters_statistics_momentum_and_epoch(join: Swarm) -> None:
    early = join()
    for _ in range(3):
        contribute(early, 0, companions=-1)
    late = join()
    until(lambda: late.stepper.swarm_peers > 0, "word of the swarm")
    late.backward(next(endless(1)))
    assert late.stepper.step(BATCH).samples_accumulated == 0, "gradients of stale weights count for nothing"
    assert [load.succeeded for load in late.loads] == [True]
    assert late.stepper.epoch == early.stepper.epoch == 3
    for ours, theirs in zip(late.net.state_dict().values(), early.net.state_dict().values(), strict=True):
        if ours.is_floating_point():
            assert torch.equal(ours, theirs)
    for ours, theirs in zip(momenta(late), momenta(early), strict=True):
        assert torch.equal(ours, theirs)


def momenta(peer: Peer) -> list[torch.Tensor]:
    return [state["momentum_buffer"] for state in peer.stepper.optimizer.state.values()]


def test_a_download_that_no_peer_answers_ends_at_its_deadline(join: Swarm) -> None:
    early = join(load_state_timeout=1.0)
    for _ in range(3):
        contribute(early, 0, companions=-1)
    late = join(load_state_timeout=1.0)
    until(lambda: late.stepper.swarm_peers > 0, "word of the swarm")
    for averager in multiprocessing.active_children():
        if isinstance(averager, StateAverager):  # nobody serves state any more, while the records say otherwise
            averager.kill_process()
    late.backward(next(endless(1)))
    late.stepper.step(BATCH)
    assert [load.succeeded for load in late.loads] == [False]
    assert late.stepper.epoch == 0


def test_groups_stay_within_target_group_size(join: Swarm) -> None:
    peers = [join(averaging_timeout=4.1), join(averaging_timeout=4.1), join(averaging_timeout=4.1)]
    together(peers)
    sizes = [r.group_size for peer in peers for r in peer.rounds if r.outcome == "averaged"]
    assert sizes
    assert max(sizes) == 2


def test_batches_of_unequal_size_count_by_their_samples(join: Swarm) -> None:
    peer = join(target_batch_size=3 * BATCH)
    small, large = torch.randn(BATCH, 6), torch.randn(2 * BATCH, 6)
    expected = network()
    stepper = LocalStepper(optimizer(parameter_groups(SGD, expected)), target_batch_size=3 * BATCH)
    for batch in (small, large):
        expected(batch).square().mean().backward()
        stepper.step(len(batch))
        peer.backward(batch)
        peer.stepper.step(len(batch))
    assert peer.stepper.epoch == 1
    for ours, theirs in zip(peer.net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
