"""The local SGD strategy against loops of plain torch."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from memory_peers import (
    Peer,
    assert_close,
    assert_equal,
    at_once,
    backward,
    batches,
    network,
    train_at_once,
    weighted_mean,
)
from torch import Tensor, nn

from averaging.config import Averaging
from averaging.transports.memory import MemorySwarm

PEERS, BATCH = 3, 4
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def local_sgd(peers: int = PEERS, steps: int = 4, **options: object) -> tuple[MemorySwarm, Averaging]:
    """A fixed world in which every peer gives `steps` micro-batches to an epoch."""
    target = peers * steps * BATCH
    config = {"strategy": "local_sgd", "local_steps": steps, "target_group_size": 16, **options}
    return MemorySwarm(target, quota=steps * BATCH), Averaging(target_batch_size=target, **config)


def joined(swarm: MemorySwarm, config: Averaging, peers: int = PEERS) -> list[Peer]:
    made = []
    for number in range(peers):
        net = network()
        made.append(Peer(swarm, str(number), config, net=net, optimizer=lambda _, net=net: sgd(net)))
    return made


def sgd(net: nn.Module, **options: float) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), **{**SGD, **options})


def given(epochs: int, steps: int = 4) -> list[list[list[Tensor]]]:
    """Micro-batches by peer and epoch."""
    return [[batches(peer, [BATCH] * steps, seed=epoch) for epoch in range(epochs)] for peer in range(PEERS)]


def in_order(share: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [batch for epoch in share for batch in epoch]


class PlainTorch:
    """Local SGD with every peer's network, optimiser and averaging written out."""

    def __init__(self) -> None:
        self.nets = [network() for _ in range(PEERS)]
        self.optimizers = [sgd(net) for net in self.nets]

    def step(self, peer: int, micro_batches: Sequence[Tensor]) -> None:
        self.optimizers[peer].zero_grad()
        for batch in micro_batches:
            backward(self.nets[peer], batch)
        for param in self.nets[peer].parameters():
            param.grad /= len(micro_batches)
        self.optimizers[peer].step()

    def share(self, weights: Sequence[float], *, momentum: bool = False) -> None:
        tensors = [[*net.parameters(), *running(net)] for net in self.nets]
        if momentum:
            for mine, net, optimizer in zip(tensors, self.nets, self.optimizers, strict=True):
                mine += [optimizer.state[p]["momentum_buffer"] for p in net.parameters()]
        with torch.no_grad():
            mean = weighted_mean(tensors, weights)
            for mine in tensors:
                for value, new in zip(mine, mean, strict=True):
                    value.copy_(new)


def running(net: nn.Module) -> list[Tensor]:
    return [buffer for buffer in net.buffers() if buffer.is_floating_point()]


@pytest.mark.parametrize("average_momentum", [False, True])
def test_it_is_local_sgd_as_loops_of_plain_torch_have_it(average_momentum: bool) -> None:
    swarm, config = local_sgd(average_momentum=average_momentum)
    peers, plain, data = joined(swarm, config), PlainTorch(), given(3)
    train_at_once(peers, [in_order(share) for share in data])
    for epoch in range(3):
        for peer in range(PEERS):
            for batch in data[peer][epoch]:
                plain.step(peer, [batch])
        plain.share([1] * PEERS, momentum=average_momentum)
    for peer, net, optimizer in zip(peers, plain.nets, plain.optimizers, strict=True):
        assert peer.stepper.epoch == 3
        assert [(end.kind, end.outcome, end.group_size) for end in peer.ends] == [("parameters", "averaged", 3)] * 3
        assert_close(peer.parameters + peer.buffers, [*net.parameters(), *running(net)])
        assert_close(peer.momenta, [optimizer.state[p]["momentum_buffer"] for p in net.parameters()])
        assert_equal(peer.parameters + peer.buffers, peers[0].parameters + peers[0].buffers)
    assert torch.equal(peers[0].momenta[0], peers[1].momenta[0]) == average_momentum


@pytest.mark.parametrize("method", ["single_process", "multiple_processes"])
def test_initial_steps_come_before_local_sgd(method: str) -> None:
    swarm, config = local_sgd(initial_steps=2, initial_step_method=method)
    peers, plain, data = joined(swarm, config), PlainTorch(), given(4)
    train_at_once(peers, [in_order(share) for share in data])
    for epoch in range(4):
        for peer in range(PEERS):
            if epoch >= 2:
                for batch in data[peer][epoch]:
                    plain.step(peer, [batch])
            elif method == "multiple_processes" or peer == 0:
                plain.step(peer, data[peer][epoch])
            else:  # BatchNorm sees the images, and is then copied over
                with torch.no_grad():
                    plain.nets[peer](data[peer][epoch][0])
        plain.share([1, 0, 0] if epoch < 2 and method == "single_process" else [1] * PEERS)
    for peer, net, optimizer in zip(peers, plain.nets, plain.optimizers, strict=True):
        assert_close(peer.parameters + peer.buffers, [*net.parameters(), *running(net)])
        assert_close(peer.momenta, [optimizer.state[p]["momentum_buffer"] for p in net.parameters()])


def test_with_one_local_step_it_is_the_collaborative_strategy() -> None:
    data, ends = given(3), []
    for strategy, options in (("local_sgd", {"local_steps": 1}), ("collaborative", {})):
        swarm = MemorySwarm(PEERS * 4 * BATCH, quota=4 * BATCH)
        peers = joined(swarm, Averaging(strategy=strategy, target_batch_size=PEERS * 4 * BATCH,
                                        target_group_size=16, **options))
        train_at_once(peers, [in_order(share) for share in data])
        ends.append(peers[1].parameters)
    assert_close(*ends)


def test_parameters_are_weighed_by_the_epochs_samples() -> None:
    swarm = MemorySwarm(12, quota={"0": 8, "1": 4})
    config = Averaging(strategy="local_sgd", local_steps=1, target_batch_size=12, target_group_size=2)
    peers = joined(swarm, config, peers=2)
    data = [batches(0, (8,)), batches(1, (4,))]
    train_at_once(peers, data)
    nets = [network(), network()]
    for net, share in zip(nets, data, strict=True):
        backward(net, share[0])
        sgd(net).step()
    expected = weighted_mean([[*net.parameters()] for net in nets], [8, 4])
    assert_close(peers[0].parameters, expected)


def test_a_faster_peer_makes_more_local_steps() -> None:
    swarm = MemorySwarm(24, quota={"fast": 16, "slow": 8})
    config = Averaging(strategy="local_sgd", local_steps=2, target_batch_size=24, target_group_size=2)
    peers, steps = [Peer(swarm, name, config) for name in ("fast", "slow")], []
    for peer in peers:
        peer.stepper.resume(0)  # both are there before the shares are worked out
    for peer in peers:
        peer.stepper.optimizer.register_step_post_hook(lambda *_, name=peer.name: steps.append(name))
        peer.stepper.resume(0)
    train_at_once(peers, [batches(0, [2] * 8), batches(1, [2] * 4)])
    # shares of 24 / (2 x 2) = 6 samples: fast has 6, 12 and a rest of 4, more than half; slow has 6, and 2 to keep
    assert sorted(steps) == ["fast"] * 3 + ["slow"]
    assert peers[1].stepper._gathered.samples == 2


def test_a_peer_too_slow_for_a_whole_share_steps_with_what_it_has() -> None:
    swarm = MemorySwarm(32, quota={"0": 28, "1": 4})
    config = Averaging(strategy="local_sgd", local_steps=2, target_batch_size=32, target_group_size=2)
    peers = joined(swarm, config, peers=2)
    for peer in peers:
        peer.stepper.resume(0)
    train_at_once(peers, [batches(0, [4] * 7), batches(1, [4])])
    assert peers[1].stepper._gathered.samples == 0
    assert all(momentum.any() for momentum in peers[1].momenta[:1])


def test_after_a_failed_round_each_goes_on_with_its_own_until_the_next() -> None:
    swarm, config = local_sgd()
    swarm.failing.add(("parameters", 0))
    peers, plain, data = joined(swarm, config), PlainTorch(), given(2)
    train_at_once(peers, [share[0] for share in data])
    for peer in range(PEERS):
        for batch in data[peer][0]:
            plain.step(peer, [batch])
    for peer, net in zip(peers, plain.nets, strict=True):
        assert peer.stepper.epoch == 1
        assert_close(peer.parameters, net.parameters())
    train_at_once(peers, [share[1] for share in data])
    for peer in peers:
        assert [end.outcome for end in peer.ends] == ["failed", "averaged"]
        assert_equal(peer.parameters, peers[0].parameters)


def test_whose_parameters_are_no_numbers_is_healed_by_the_others() -> None:
    swarm, config = local_sgd()
    swarm.quota = {"0": 4 * BATCH, "1": 4 * BATCH, "2": 0}
    peers, data = joined(swarm, config), given(1)
    with torch.no_grad():
        peers[2].net[5].bias.fill_(float("nan"))
    train_at_once(peers, [data[0][0], data[1][0], data[2][0][:1]])
    assert all(p.isfinite().all() for peer in peers for p in peer.parameters)
    assert_equal(peers[2].parameters, peers[0].parameters)
    assert peers[2].ends[0].refused == {"non-finite": 1}


def test_parameters_that_are_to_stay_local_are_not_averaged() -> None:
    def optimizer(peer: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": peer.net[1].parameters()}, {"params": peer.net[2].parameters()}, {
            "params": peer.net[5].parameters(), "allow_data_parallelism": False}], lr=0.1)

    swarm, config = local_sgd(peers=2)
    peers = [Peer(swarm, str(number), config, optimizer=optimizer) for number in range(2)]
    train_at_once(peers, [batches(number, [BATCH] * 4) for number in range(2)])
    assert_equal(peers[0].parameters[:3], peers[1].parameters[:3])
    assert not torch.equal(peers[0].parameters[3], peers[1].parameters[3])


def test_alone_it_is_plain_training() -> None:
    swarm, config = local_sgd(peers=1)
    peer, net = joined(swarm, config, peers=1)[0], network()
    optimizer = sgd(net)
    for batch in batches(0, [BATCH] * 8):
        peer.train([batch])
        optimizer.zero_grad()
        backward(net, batch)
        optimizer.step()
    assert_close(peer.parameters, net.parameters())
    assert [(end.kind, end.outcome) for end in peer.ends] == [("parameters", "alone")] * 2


def test_initial_weights_become_those_of_the_first() -> None:
    swarm, config = local_sgd()
    peers = [Peer(swarm, str(number), config, net=network(number)) for number in range(PEERS)]
    expected = [p.clone() for p in peers[0].parameters]
    at_once([peer.stepper.synchronise for peer in peers])
    for peer in peers:
        assert_equal(peer.parameters, expected)
        assert [(end.kind, end.outcome) for end in peer.ends] == [("initial", "averaged")]
