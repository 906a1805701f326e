"""The collaborative strategy against one process that makes the same updates."""

import time
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from itertools import pairwise
from threading import Event, Thread

import pytest
import torch
from memory_peers import (
    Peer,
    assert_close,
    assert_equal,
    at_once,
    backward,
    batches,
    governed,
    network,
    one_process,
    plain_sgd,
    spread,
    train_at_once,
    weighted_mean,
)
from processes import until
from torch import Tensor, nn

from averaging.config import Averaging
from averaging.records import RoundEnd
from averaging.strategies.assist import assist
from averaging.transports.memory import MemorySwarm
from training.optimizers.config import Optimizer

RULES = {
    "sgd": Optimizer(lr=0.1, momentum=0.9, weight_decay=0.01, regularize_bn=False, max_epochs=100),
    "adamw": Optimizer(name="adamw", lr=0.01, weight_decay=0.1, max_epochs=100),
    "larc": Optimizer(lr=0.5, momentum=0.9, weight_decay=0.01, use_larc=True, larc={"trust_coefficient": 0.02},
                      max_epochs=100),
    "clipped": Optimizer(lr=0.1, momentum=0.9, weight_decay=0.01, grad_clip_norm=0.3, max_epochs=100),
}
SIZES = [(4, 4), (3, 5, 4), (6,), (3, 3, 3, 3), (9, 4), (5, 3)]  # micro-batches of each peer in an epoch


def averaging(target: int, **options: object) -> Averaging:
    return Averaging(**{"target_batch_size": target, "target_group_size": 16, **options})


def ruled(rule: Optimizer, peer: Peer) -> torch.optim.Optimizer:
    return governed(rule, peer.net, lambda: peer.stepper.epoch)


def fixed_world(sizes: Sequence[Sequence[int]], **options: object) -> tuple[MemorySwarm, Averaging]:
    """A swarm in which every peer gives micro-batches of these sizes to each epoch, whatever the others do."""
    total = sum(map(sum, sizes))
    swarm = MemorySwarm(total, quota={str(peer): sum(given) for peer, given in enumerate(sizes)})
    return swarm, averaging(total, **options)


def shares(sizes: Sequence[Sequence[int]], epochs: int) -> list[list[list[Tensor]]]:
    """Micro-batches by peer and epoch."""
    return [[batches(peer, given, seed=epoch) for epoch in range(epochs)] for peer, given in enumerate(sizes)]


def flat(share: Sequence[Sequence[Tensor]]) -> Iterator[Tensor]:
    for epoch in share:
        yield from epoch


def outcomes(peer: Peer) -> list[tuple[str, int]]:
    return [(end.outcome, end.group_size) for end in peer.ends]


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("rule", RULES)
def test_peers_end_every_epoch_with_the_weights_of_one_process(rule: str, count: int) -> None:
    sizes = SIZES[:count]
    swarm, config = fixed_world(sizes)
    peers = [Peer(swarm, str(number), config, optimizer=partial(ruled, RULES[rule])) for number in range(count)]
    given = shares(sizes, 4)
    train_at_once(peers, [flat(share) for share in given])
    expected = one_process(RULES[rule], [[share[epoch] for share in given] for epoch in range(4)])
    for peer in peers:
        assert peer.stepper.epoch == 4
        assert outcomes(peer) == [("averaged", count)] * 4
        assert_close(peer.parameters, expected.parameters())
        assert_close(peer.buffers, [b for b in expected.buffers() if b.is_floating_point()])
        assert_equal(peer.parameters + peer.buffers, peers[0].parameters + peers[0].buffers)
    assert not any(round.with_state for round in swarm.rounds.values()), "equal peers need no state averaged"


def test_clipping_is_at_work_in_the_equivalence() -> None:
    given = [[batches(0, (8,), seed=epoch)] for epoch in range(4)]
    free, clipped = (one_process(RULES[rule], given) for rule in ("sgd", "clipped"))
    assert any((ours - theirs).abs().max() > 1e-2
               for ours, theirs in zip(free.parameters(), clipped.parameters(), strict=True))


@pytest.mark.parametrize(("codec", "tolerance"), [("fp16", 1e-3), ("uniform8bit", 2e-2), ("blockwise8bit", 2e-2)])
def test_compressed_gradients_are_as_fine_whatever_the_scale_of_batch_norms_statistics(
        codec: str, tolerance: float) -> None:
    def trained(factor: float, **options: str) -> list[Tensor]:
        swarm, config = fixed_world(SIZES[:2], **options)
        peers = [Peer(swarm, str(number), config, optimizer=partial(ruled, RULES["sgd"])) for number in range(2)]
        for peer in peers:
            peer.net.register_buffer("large", torch.full((5,), factor))
            peer.stepper.buffers.append(peer.net.large)
        train_at_once(peers, [flat(share) for share in shares(SIZES[:2], 2)])
        assert_equal(peers[0].parameters, peers[1].parameters)
        return peers[0].parameters

    exact = trained(1.0)
    for factor in (1.0, 1e6):
        for ours, theirs in zip(trained(factor, compression=codec), exact, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0.0, atol=tolerance)


def test_a_peer_alone_trains_like_one_process() -> None:
    swarm = MemorySwarm(8)
    peer = Peer(swarm, "a", averaging(8), optimizer=partial(ruled, RULES["sgd"]))
    given = shares([(3, 5)], 3)[0]
    progress = peer.train(flat(given))
    assert_close(peer.parameters, one_process(RULES["sgd"], [[epoch] for epoch in given]).parameters())
    assert outcomes(peer) == [("alone", 1)] * 3
    assert [(p.epoch, p.updated, p.samples_accumulated, p.swarm_samples) for p in progress[:3]] == [
        (0, False, 3, 3), (1, True, 0, 8), (1, False, 3, 3)]


@pytest.mark.parametrize("group_size", [2, 3])
def test_in_groups_smaller_than_the_swarm_peers_come_to_one_model(group_size: int) -> None:
    swarm, config = fixed_world([(4,)] * 6, target_group_size=group_size)
    peers = [Peer(swarm, str(number), config, net=network(number),
                  optimizer=lambda peer: torch.optim.SGD(peer.net.parameters(), lr=0.0)) for number in range(6)]
    spreads = [spread(peers)]
    for epoch in range(8):
        train_at_once(peers, [batches(number, (4,), seed=epoch) for number in range(6)])
        spreads.append(spread(peers))
    assert {size for peer in peers for _, size in outcomes(peer)} == {group_size}
    assert all(after <= before * 1.0001 for before, after in pairwise(spreads))
    # of random groups of m among n, the mean square distance falls by (n/m - 1) / (n - 1) per epoch on average
    expected = ((6 / group_size - 1) / 5) ** 0.5
    contraction = (spreads[-1] / spreads[0]) ** (1 / 8)
    print(f"groups of {group_size}: distance x {contraction:.2f} per epoch, {expected:.2f} expected")
    assert contraction < expected + 0.1


@pytest.mark.parametrize("group_size", [2, 3])
def test_groups_smaller_than_the_swarm_learn_what_one_large_group_learns(group_size: int) -> None:
    sizes, epochs = [(8,)] * 6, 20
    given = shares(sizes, epochs)
    swarm, config = fixed_world(sizes, target_group_size=group_size)
    peers = [Peer(swarm, str(number), config, optimizer=partial(ruled, RULES["sgd"])) for number in range(6)]
    train_at_once(peers, [flat(share) for share in given])
    expected = one_process(RULES["sgd"], [[share[epoch] for share in given] for epoch in range(epochs)])
    moved = distance(expected.parameters(), network().parameters())
    mean = weighted_mean([peer.parameters for peer in peers], [1.0] * 6)
    print(f"moved {moved:.2f}; spread {spread(peers):.3f}; off {distance(mean, expected.parameters()):.3f}")
    assert spread(peers) < 0.05 * moved
    assert distance(mean, expected.parameters()) < 0.1 * moved


def distance(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    return sum(float((our - their).detach().square().sum()) for our, their in zip(ours, theirs, strict=True)) ** 0.5


def test_a_bad_gradient_is_dropped_counted_and_sent_to_nobody() -> None:
    sizes = [(4, 4), (3, 3)]
    swarm, config = fixed_world(sizes)
    peers = [Peer(swarm, str(number), config, optimizer=partial(ruled, RULES["sgd"])) for number in range(2)]
    given = shares(sizes, 3)

    def train_with_a_bad_one() -> None:
        peers[1].train([*given[1][0], given[1][1][0]])
        backward(peers[1].net, 10 * given[1][1][0])
        next(peers[1].net.parameters()).grad.view(-1)[0] = float("nan")
        assert peers[1].stepper.step(3).samples_accumulated == 3
        peers[1].train([given[1][1][1], *given[1][2]])

    at_once([lambda: peers[0].train(flat(given[0])), train_with_a_bad_one])
    expected = one_process(RULES["sgd"], [[share[epoch] for share in given] for epoch in range(3)])
    for peer in peers:
        assert_close(peer.parameters, expected.parameters())
    assert [end.refused for end in peers[1].ends] == [{}, {"non-finite": 1}, {}]
    assert [end.refused for end in peers[0].ends] == [{}] * 3


def test_a_peer_that_has_nothing_but_bad_gradients_takes_the_others_mean() -> None:
    swarm, config = fixed_world([(4,), (4,), ()])
    peers = [Peer(swarm, str(number), config, optimizer=partial(ruled, RULES["sgd"])) for number in range(3)]
    given = shares([(4,), (4,), (4,)], 1)

    def spoilt() -> None:
        backward(peers[2].net, given[2][0][0])
        peers[2].net[5].bias.grad.fill_(float("inf"))
        assert peers[2].stepper.step(4).updated

    at_once([lambda: peers[0].train(given[0][0]), lambda: peers[1].train(given[1][0]), spoilt])
    expected = one_process(RULES["sgd"], [[given[0][0], given[1][0]]])
    for peer in peers:
        assert_close(peer.parameters, expected.parameters())
        assert_equal(peer.buffers, peers[0].buffers)
    assert peers[2].ends[0].refused == {"non-finite": 1}


def test_whose_statistics_are_no_numbers_contributes_nothing_and_gets_the_others() -> None:
    swarm, config = fixed_world([(4,)] * 3)
    peers = [Peer(swarm, str(number), config) for number in range(3)]
    peers[1].stepper.resume(0)
    peers[1].momenta[0].fill_(float("nan"))
    peers[1].stepper._sketch = b"other"  # what tells members that state is to be averaged
    train_at_once(peers, [batches(number, (4,)) for number in range(3)])
    assert peers[1].ends[0].refused == {"non-finite": 1}
    for peer in peers:
        assert_equal(peer.parameters + peer.momenta, peers[0].parameters + peers[0].momenta)
        assert all(p.isfinite().all() for p in peer.parameters + peer.momenta)


def test_in_a_failed_round_peers_use_their_own_gradients_and_the_next_heals() -> None:
    sizes = [(4, 4), (3, 3)]
    swarm, config = fixed_world(sizes)
    swarm.failing.add(("gradients", 1))
    peers = [Peer(swarm, str(number), config) for number in range(2)]
    given = shares(sizes, 3)
    train_at_once(peers, [share[0] for share in given])
    own = [one_step_on(peer, share[1]) for peer, share in zip(peers, given, strict=True)]
    train_at_once(peers, [share[1] for share in given])
    for peer, expected in zip(peers, own, strict=True):
        assert outcomes(peer) == [("averaged", 2), ("failed", 1)]
        assert peer.ends[1].reason
        assert_close(peer.parameters, expected)
    assert spread(peers) > 1e-3
    train_at_once(peers, [share[2] for share in given])
    assert_equal(peers[0].parameters + peers[0].momenta, peers[1].parameters + peers[1].momenta)
    assert outcomes(peers[0])[2] == ("averaged", 2)


def one_step_on(peer: Peer, share: Sequence[Tensor]) -> list[Tensor]:
    """The parameters after a step of plain SGD, from where the peer is, on its own mean gradient."""
    net = network()
    net.load_state_dict(peer.net.state_dict())
    optimizer = plain_sgd(net)
    optimizer.load_state_dict(deepcopy(peer.stepper.optimizer.state_dict()))
    for batch in share:
        output = net(batch)
        ((output - batch[:, :3].sin()).square().sum() / sum(map(len, share))).backward()
    optimizer.step()
    return [p.detach() for p in net.parameters()]


def test_who_is_lost_in_a_round_changes_nothing_for_the_others() -> None:
    sizes = [(4,), (4,), (4,)]
    swarm, config = fixed_world(sizes)
    swarm.lost.add(("gradients", 0, "2"))
    peers = [Peer(swarm, str(number), config, optimizer=partial(ruled, RULES["sgd"])) for number in range(3)]
    given = shares(sizes, 2)
    train_at_once(peers, [share[0] for share in given])
    expected = one_process(RULES["sgd"], [[given[0][0], given[1][0]]])
    for peer in peers[:2]:
        assert_close(peer.parameters, expected.parameters())
    assert [outcomes(peer) for peer in peers] == [[("averaged", 2)], [("averaged", 2)], [("failed", 1)]]
    train_at_once(peers, [share[1] for share in given])
    assert_equal(peers[0].parameters, peers[2].parameters)


def test_state_is_averaged_every_so_many_epochs_and_weighs_by_samples() -> None:
    sizes = [(6,), (2,)]
    swarm, config = fixed_world(sizes, average_state_every=3)
    peers = [Peer(swarm, str(number), config, optimizer=lambda peer: torch.optim.SGD(peer.net.parameters(), lr=0.0))
             for number in range(2)]
    given = shares(sizes, 4)
    train_at_once(peers, [share[0] for share in given])
    for peer, shift in zip(peers, (0.0, 1.0), strict=True):
        torch._foreach_add_(peer.parameters, shift)
    start = [peer.parameters[0].clone() for peer in peers]
    for epoch in (1, 2):
        train_at_once(peers, [share[epoch] for share in given])
        assert_equal([peers[0].parameters[0], peers[1].parameters[0]], start)
    train_at_once(peers, [share[3] for share in given])
    for peer in peers:
        assert_close(peer.parameters[:1], [0.75 * start[0] + 0.25 * start[1]])


def test_who_differs_from_the_majority_downloads_its_state_where_none_is_averaged_soon() -> None:
    swarm, config = fixed_world([(4,)] * 3, average_state_every=100)
    peers = [Peer(swarm, str(number), config) for number in range(3)]
    given = shares([(4,)] * 3, 3)
    swarm.failing.add(("gradients", 1))
    train_at_once(peers, [share[0] for share in given])
    # two go on alike, the third otherwise
    train_at_once(peers, [batches(7, (4,), seed=seed) for seed in (1, 1, 2)])
    assert spread(peers) > 1e-3
    assert [peer.stepper.step(0).epoch for peer in peers[:2]] == [2, 2]
    peers[2].train(batches(2, (4,)))
    assert [load.succeeded for load in peers[2].loads] == [True]
    assert not peers[0].loads
    assert_equal(peers[2].parameters + peers[2].momenta, peers[0].parameters + peers[0].momenta)


def test_a_late_joiner_takes_over_all_that_matters_and_is_equal() -> None:
    swarm = MemorySwarm(8)
    early = Peer(swarm, "early", averaging(8))
    early.train(batches(0, [4] * 6))
    late = Peer(swarm, "late", averaging(8), net=network(5))
    backward(late.net, batches(1, (4,))[0])
    assert late.stepper.step(4).samples_accumulated == 0, "gradients of stale weights count for nothing"
    assert [load.succeeded for load in late.loads] == [True]
    assert late.stepper.epoch == early.stepper.epoch == 3
    assert_equal(late.parameters + late.buffers + late.momenta, early.parameters + early.buffers + early.momenta)
    assert all(p.grad is None for p in late.net.parameters())
    swarm.quota = 4
    train_at_once([early, late], [batches(0, (4,)), batches(1, (4,))])
    assert outcomes(late) == [("averaged", 2)]
    assert_equal(late.parameters + late.momenta, early.parameters + early.momenta)


def test_an_auxiliary_helps_and_changes_nothing() -> None:
    sizes = [(4, 4), (3, 3)]
    swarm, config = fixed_world(sizes)
    helper, stop, ends = swarm.join("helper", auxiliary=True), Event(), list[RoundEnd]()
    thread = Thread(target=assist, args=(config, helper, stop, ends.append))
    thread.start()
    try:
        peers = [Peer(swarm, str(number), config, optimizer=partial(ruled, RULES["sgd"])) for number in range(2)]
        given = shares(sizes, 3)
        train_at_once(peers, [flat(share) for share in given])
        until(lambda: len(ends) == 3, "the helper's rounds end", 10)
    finally:
        stop.set()
        thread.join()
    expected = one_process(RULES["sgd"], [[share[epoch] for share in given] for epoch in range(3)])
    assert_close(peers[0].parameters, expected.parameters())
    assert [(end.outcome, end.group_size, end.epoch) for end in ends] == [("averaged", 3, epoch) for epoch in range(3)]
    assert peers[0].stepper.swarm_peers == 2


def test_parameters_that_are_to_stay_local_follow_their_own_gradients() -> None:
    def optimizer(peer: Peer) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": peer.net[1].parameters()}, {"params": peer.net[2].parameters()}, {
            "params": peer.net[5].parameters(), "allow_data_parallelism": False}], lr=0.1)

    swarm, config = fixed_world([(4,), (4,)])
    peers = [Peer(swarm, str(number), config, optimizer=optimizer) for number in range(2)]
    given = [batches(number, (4,)) for number in range(2)]
    gradients = []
    for share in given:
        net = network()
        backward(net, share[0])
        gradients.append([p.grad for p in net.parameters()])
    mean = weighted_mean(gradients, [1, 1])
    train_at_once(peers, given)
    for peer, own in zip(peers, gradients, strict=True):
        expected = [p - 0.1 * g for p, g in zip(network().parameters(), [*mean[:3], *own[3:]], strict=True)]
        assert_close(peer.parameters, expected)
    assert not torch.equal(peers[0].parameters[4], peers[1].parameters[4])
    assert not any(value.shape == (3, 10) for value in peers[0].stepper.read_state().values()), "nor downloaded"


def test_hurry_ends_the_wait_for_others() -> None:
    swarm, config = fixed_world([(4,), (4,)])
    waiting, _ = Peer(swarm, "0", config), Peer(swarm, "1", config)
    done = Event()

    def hurry() -> None:
        while not done.wait(0.02):
            if swarm.rounds:
                waiting.stepper.hurry()

    thread = Thread(target=hurry)
    thread.start()
    started = time.monotonic()
    waiting.train(batches(0, (4,)))
    done.set()
    thread.join()
    assert time.monotonic() - started < 5  # the memory swarm waits for 20
    assert outcomes(waiting) == [("failed", 1)]


# -- overlap --


class Delayed:
    """The delayed-update recursion in one process, by the definition: versions of the parameters, and who saw which."""

    def __init__(self, rule: Optimizer) -> None:
        self.net, self.updates = network(), 0
        self.optimizer = governed(rule, self.net, lambda: self.updates)
        self.versions = [self._parameters()]

    def _parameters(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.net.parameters()]

    def update(self, contributions: Sequence[tuple[int, Tensor]]) -> None:
        """One update from (version of the parameters, micro-batch) of all peers."""
        samples, gradients = sum(len(batch) for _, batch in contributions), []
        for version, batch in contributions:
            with torch.no_grad():
                torch._foreach_copy_(list(self.net.parameters()), self.versions[version])
            backward(self.net, batch)
            gradients.append([p.grad.clone() for p in self.net.parameters()])
            self.net.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(list(self.net.parameters()), self.versions[-1])
        for param, grad in zip(self.net.parameters(), weighted_mean(
                gradients, [len(batch) / samples for _, batch in contributions]), strict=True):
            param.grad = grad
        self.optimizer.step()
        self.net.zero_grad()
        self.updates += 1
        self.versions.append(self._parameters())


@pytest.mark.parametrize("slow", [True, False], ids=["rounds as long as epochs", "quick rounds"])
@pytest.mark.parametrize("rule", ["sgd", "adamw", "clipped"])
def test_overlap_is_the_delayed_update_recursion(rule: str, slow: bool) -> None:
    sizes, epochs = [(4, 4), (3, 5, 4), (6, 3, 3)], 6
    swarm, config = fixed_world(sizes, overlap=True)
    swarm.slow = slow
    peers = [Peer(swarm, str(number), config, optimizer=partial(ruled, RULES[rule])) for number in range(3)]
    given = shares(sizes, epochs)
    seen: list[list[list[int]]] = [[], [], []]  # by peer and epoch: which version of the parameters a batch saw

    def train(number: int) -> None:
        peer = peers[number]
        for epoch in given[number]:
            seen[number].append([])
            for batch in epoch:
                seen[number][-1].append(peer.stepper.epoch)
                peer.train([batch])
        peer.stepper.settle()

    at_once([partial(train, number) for number in range(3)])
    expected = Delayed(RULES[rule])
    for epoch in range(epochs):
        expected.update([(version, batch) for number in range(3)
                         for version, batch in zip(seen[number][epoch], given[number][epoch], strict=True)])
    for peer in peers:
        assert peer.stepper.epoch == epochs
        assert_close(peer.parameters, expected.versions[-1])
        assert_equal(peer.parameters + peer.buffers, peers[0].parameters + peers[0].buffers)
    late = [epoch - version for peer in seen for epoch, versions in enumerate(peer) for version in versions]
    assert set(late) <= {0, 1}
    if slow:
        assert all(lag == (epoch > 0) for peer in seen
                   for epoch, versions in enumerate(peer) for lag in [epoch - version for version in versions])


def test_statistics_of_batchnorm_keep_what_came_during_an_overlapping_round() -> None:
    sizes = [(4,), (4,)]
    swarm, config = fixed_world(sizes, overlap=True)
    swarm.slow = True
    peers = [Peer(swarm, str(number), config, optimizer=lambda peer: torch.optim.SGD(peer.net.parameters(), lr=0.0))
             for number in range(2)]
    given = shares(sizes, 3)
    train_at_once(peers, [flat(share) for share in given])
    for peer in peers:
        peer.stepper.settle()
    nets, lags = [network(), network()], [None, None]
    for epoch in range(3):
        for net, share in zip(nets, given, strict=True):
            net(share[epoch][0])
        if epoch:
            apply(nets, lags)
        lags = [[b.clone() for b in running(net)] for net in nets]
    apply(nets, lags)
    for peer, net in zip(peers, nets, strict=True):
        assert_close(peer.buffers, running(net))


def running(net: nn.Module) -> list[Tensor]:
    return [buffer for buffer in net.buffers() if buffer.is_floating_point()]


def apply(nets: Sequence[nn.Module], before: Sequence[Sequence[Tensor]]) -> None:
    mean = weighted_mean(before, [1, 1])
    for net, old in zip(nets, before, strict=True):
        for buffer, new, was in zip(running(net), mean, old, strict=True):
            buffer.add_(new - was)


def test_a_failed_round_in_the_background_leaves_the_own_gradient() -> None:
    swarm, config = fixed_world([(4,), (4,)], overlap=True)
    swarm.failing.add(("gradients", 0))
    peers = [Peer(swarm, str(number), config) for number in range(2)]
    given = shares([(4,), (4,)], 2)
    own = [one_step_on(peer, share[0]) for peer, share in zip(peers, given, strict=True)]
    train_at_once(peers, [share[0] for share in given])
    for peer, expected in zip(peers, own, strict=True):
        assert (peer.stepper.epoch, swarm.peers[peer.name].epoch) == (0, 1), "it gathers for the next one already"
        peer.stepper.settle()
        assert peer.stepper.epoch == 1
        assert_close(peer.parameters, expected)


def test_a_newcomer_of_an_overlapping_swarm_is_in_pace_and_soon_equal() -> None:
    swarm, config = fixed_world([(4,)] * 3, overlap=True)
    swarm.slow = True
    adamw = partial(ruled, RULES["adamw"])
    early = [Peer(swarm, str(number), config, optimizer=adamw) for number in range(2)]
    given = shares([(4,)] * 3, 8)
    train_at_once(early, [flat(share[:4]) for share in given[:2]])
    late = Peer(swarm, "2", config, net=network(5), optimizer=adamw)
    late.train(given[2][4])
    assert late.loads[0].succeeded
    assert (late.stepper.epoch, swarm.peers["2"].epoch) == (4, 4)
    everyone = [*early, late]
    train_at_once(everyone, [flat(share[5:]) for share in given])
    for peer in everyone:
        peer.stepper.settle()
    assert len(late.loads) == 1
    assert outcomes(late) == [("averaged", 3)] * 3
    ours, theirs = late.stepper.read_state(), early[0].stepper.read_state()
    assert any(name.endswith(".step") for name in ours)
    assert_equal([ours[name] for name in theirs], theirs.values())


def test_leaving_in_the_midst_of_a_round_in_the_background_is_quick() -> None:
    swarm, config = fixed_world([(4,), (4,)], overlap=True)
    peers = [Peer(swarm, str(number), config) for number in range(2)]
    peers[0].train(batches(0, (4,)))
    started = time.monotonic()
    peers[0].stepper.close()
    assert time.monotonic() - started < 4
    assert list(swarm.peers) == ["1"]
