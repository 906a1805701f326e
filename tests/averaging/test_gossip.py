from collections.abc import Callable, Collection, Sequence
from math import sqrt
from typing import Any

import pytest
import torch
from memory_peers import at_once
from threads_of_peers import SHAPES, Optimizer, Peer, fixed_world, flat, gradients, names, sgd, start, together
from torch import Tensor

from averaging.config import Averaging
from averaging.records import RoundEnd
from averaging.strategies.gossip import Gossip
from averaging.topology import groups
from averaging.transports.memory import MemorySwarm
from training.optimizers.accum_adam import AccumAdam

CLOSE = {"rtol": 3e-6, "atol": 3e-6}
TOPOLOGIES = ["complete", "ring", "one-peer-exp", "alternating-exp-ring"]
MACHINES = [["000", "003"], ["001"], ["002", "004", "005"], ["006"]]


def config_of(peers: int, topology: str, *, per_epoch: int = 1, **options: Any) -> Averaging:
    # threads run ahead of each other where their groups don't meet; here that is no reason to download a state
    options = {"target_group_size": 8, "max_allowed_epoch_difference": 9} | options
    return Averaging(strategy="gossip", topology=topology, target_batch_size=2 * peers * per_epoch, **options)


class InMachines:
    """A transport that knows which peers share a machine."""

    def __init__(self, transport: Any, machines: Sequence[Sequence[str]]) -> None:
        self._transport, self.machines = transport, machines

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def machines_of(peers: int) -> list[list[str]]:
    present = set(names(peers))
    return [there for machine in MACHINES if (there := [name for name in machine if name in present])]


def run(config: Averaging, peers: int, steps: int, swarm: MemorySwarm | None = None, **options: Any) -> list[Peer]:
    """All peers, at the end; each makes micro-batches of two samples, as many in an epoch as the config has it."""
    per_epoch = config.target_batch_size // (2 * peers)
    swarm = swarm or fixed_world(config, [2] * peers, per_epoch)
    return together(swarm, [
        lambda transport, number=number: Peer(config, InMachines(transport, machines_of(peers)), number,
                                              **options).run(steps, 2)
        for number in range(peers)])


def mixing(topology: str, peers: int, step: int) -> Tensor:
    """W [n, n]."""
    matrix = torch.zeros(peers, peers, dtype=torch.float64)
    for group in groups(topology, names(peers), step, machines_of(peers)):
        for one in group:
            for other in group:
                matrix[int(one), int(other)] = 1 / len(group)
    return matrix


def simulate(topology: str, peers: int, epochs: int, *, optimizer: Callable[[Any], Optimizer] = sgd,
             per_epoch: int = 1, unmixed: Collection[int] = ()) -> list[list[Tensor]]:
    """Parameters by peer and epoch: X <- W X, and then each row's optimiser, on gradients at the rows before."""
    rows = [start() for _ in range(peers)]
    optimizers = [optimizer(row) for row in rows]
    history: list[list[Tensor]] = [[] for _ in range(peers)]
    with torch.no_grad():
        for epoch in range(epochs):
            means = [[torch.stack(parts).mean(0) for parts in zip(*(
                gradients(row, peer, epoch * per_epoch + each) for each in range(per_epoch)), strict=True)]
                for peer, row in enumerate(rows)]
            if epoch and epoch - 1 not in unmixed:
                matrix = mixing(topology, peers, epoch - 1)
                stacked = matrix @ torch.stack([flat(row) for row in rows]).double()
                for row, values in zip(rows, stacked, strict=True):
                    parts = torch.split(values, [param.numel() for param in row])
                    for param, part in zip(row, parts, strict=True):
                        param.copy_(part.view_as(param))
            for peer, row in enumerate(rows):
                for param, grad in zip(row, means[peer], strict=True):
                    param.grad = grad
                optimizers[peer].step()
                history[peer].append(flat(row))
    return history


def of_parameters(peer: Peer) -> Tensor:
    """[micro-batches, N], without the buffer."""
    return torch.stack(peer.history)[:, :-3]


def as_gossip(peer: Peer) -> Gossip:
    assert isinstance(peer.strategy, Gossip)
    return peer.strategy


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("peers", [1, 2, 3, 4, 5, 7])
def test_peers_do_what_the_matrix_does(topology: str, peers: int) -> None:
    config = config_of(peers, topology)
    expected = simulate(topology, peers, epochs=9)
    for peer, history in zip(run(config, peers, 9), expected, strict=True):
        torch.testing.assert_close(of_parameters(peer), torch.stack(history), **CLOSE)


@pytest.mark.parametrize("per_epoch", [1, 3])
def test_accum_adam_accumulates_over_steps_as_it_does_alone(per_epoch: int) -> None:
    def accum_adam(params: Any) -> Optimizer:
        return AccumAdam(params, lr=0.05, accum_iter=3)

    config = config_of(4, "one-peer-exp", per_epoch=per_epoch)
    expected = simulate("one-peer-exp", 4, epochs=8, optimizer=accum_adam, per_epoch=per_epoch)
    for peer, history in zip(run(config, 4, 8 * per_epoch, optimizer=accum_adam), expected, strict=True):
        torch.testing.assert_close(of_parameters(peer)[per_epoch - 1::per_epoch], torch.stack(history), rtol=1e-5,
                                   atol=1e-5)


class Recording(InMachines):
    """A transport that notes when a meeting begins and when its result is taken."""

    def __init__(self, transport: Any, events: list[str]) -> None:
        super().__init__(transport, [["000"], ["001"]])
        self._events = events

    def meet(self, *tensors: Any, epoch: int, **options: Any) -> Any:
        self._events.append(f"mixing {epoch} begins")
        return RecordingMeeting(self._transport.meet(*tensors, epoch=epoch, **options), self._events, epoch)


class RecordingMeeting:
    def __init__(self, meeting: Any, events: list[str], epoch: int) -> None:
        self._meeting, self._events, self._epoch = meeting, events, epoch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._meeting, name)

    def result(self) -> Any:
        self._events.append(f"mixing {self._epoch} is taken")
        return self._meeting.result()


def test_mixing_begins_before_the_gradient_is_worked_out_and_is_taken_after_it() -> None:
    def noting(transport: Any, number: int) -> list[str]:
        events = list[str]()
        peer = Peer(config_of(2, "complete"), Recording(transport, events), number)
        peer.optimizer.register_step_pre_hook(lambda *_: events.append("update"))
        for step in range(3):
            events.append(f"gradient {step}")
            peer.step(2)
        return events

    swarm = fixed_world(config_of(2, "complete"), [2, 2], 1)
    for events in together(swarm, [lambda transport, number=number: noting(transport, number) for number in (0, 1)]):
        assert events == [
            "gradient 0", "update", "mixing 0 begins",
            "gradient 1", "mixing 0 is taken", "update", "mixing 1 begins",
            "gradient 2", "mixing 1 is taken", "update", "mixing 2 begins"]


def test_nobody_waits_for_the_others_before_the_epoch_ends() -> None:
    config = config_of(2, "complete", per_epoch=3)
    swarm = fixed_world(config, [2, 2], 3)
    one, other = (Peer(config, swarm.join(name), number) for number, name in enumerate(names(2)))
    one.run(3 + 2, 2)  # an epoch, and all but the last micro-batch of the next, while the other has not begun
    assert one.strategy.epoch == 1
    at_once([lambda: one.run(1, 2), lambda: other.run(6, 2)])
    assert one.strategy.epoch == other.strategy.epoch == 2


def test_a_failed_meeting_leaves_everyone_with_their_own_parameters_for_a_step() -> None:
    config, ends = config_of(4, "ring"), list[RoundEnd]()
    swarm = fixed_world(config, [2] * 4, 1)
    swarm.failing.add(("parameters", 2))
    expected = simulate("ring", 4, epochs=7, unmixed={2})
    for peer, history in zip(run(config, 4, 7, swarm, on_round=ends.append), expected, strict=True):
        torch.testing.assert_close(of_parameters(peer), torch.stack(history), **CLOSE)
    assert sum(end.outcome == "failed" for end in ends) == 4


def test_a_peer_that_is_left_behind_only_makes_its_own_update() -> None:
    config = config_of(3, "complete")
    swarm = fixed_world(config, [2] * 3, 1)
    swarm.lost.add(("parameters", 0, "001"))
    peers = run(config, 3, 2, swarm)
    rows = [start() for _ in range(3)]
    for peer, row in enumerate(rows):
        with torch.no_grad():
            torch._foreach_sub_(row, gradients(row, peer, 0), alpha=0.1)
    met = (flat(rows[0]) + flat(rows[2])) / 2
    for peer, mixed in zip(peers, (met, flat(rows[1]), met), strict=True):
        after = of_parameters(peer)
        row = [part.view(shape) for part, shape in zip(torch.split(after[0], [p.numel() for p in rows[0]]), SHAPES,
                                                       strict=True)]
        momentum = flat(gradients(start(), peer.number, 0)) * 0.9 + flat(gradients(row, peer.number, 1))
        torch.testing.assert_close(after[1], mixed - 0.1 * momentum, **CLOSE)


def test_without_samples_a_peer_only_mixes() -> None:
    config = Averaging(strategy="gossip", target_batch_size=4, target_group_size=4)
    swarm = MemorySwarm(4)
    busy, idle = (Peer(config, swarm.join(name), number) for number, name in enumerate(names(2)))
    idle.optimizer.register_step_pre_hook(lambda *_: pytest.fail("there is no gradient"))
    gradient_is_lost(idle, epochs=1, busy=busy)
    assert idle.strategy.epoch == 1
    at_once([busy.strategy.settle, idle.strategy.settle])
    assert torch.equal(flat(busy.params), flat(idle.params))
    torch.testing.assert_close(flat(idle.params), (flat(start()) + of_parameters(busy)[-1]) / 2)


def gradient_is_lost(idle: Peer, epochs: int, busy: Peer) -> None:
    """`busy` gathers all samples of the epochs; whatever `idle` makes is not finite."""
    for _ in range(epochs):
        busy.step(4)
        for param in idle.params:
            param.grad = torch.full_like(param, torch.nan)
        idle.strategy.step(2)


def test_groups_larger_than_the_target_are_cut_and_all_still_agree_in_the_end() -> None:
    config, ends = config_of(6, "complete", target_group_size=2), list[RoundEnd]()

    def still(params: Any) -> Optimizer:
        return torch.optim.SGD(params, lr=0.0)

    swarm = fixed_world(config, [2] * 6, 1)
    peers = together(swarm, [lambda transport, number=number: Peer(
        config, transport, number, optimizer=still, seed=number, on_round=ends.append) for number in range(6)])
    first = torch.stack([flat(peer.params) for peer in peers])
    at_once([lambda peer=peer: peer.run(60, 2) for peer in peers])
    last = torch.stack([flat(peer.params) for peer in peers])
    assert {end.group_size for end in ends} == {2}
    torch.testing.assert_close(last.mean(0), first.mean(0), **CLOSE)
    assert (last - last.mean(0)).norm() < 1e-3 * (first - first.mean(0)).norm()


def test_the_optimisers_statistics_and_buffers_stay_local() -> None:
    peers = run(config_of(3, "complete"), 3, 4)
    momenta = [flat([peer.optimizer.state[p]["momentum_buffer"] for p in peer.params]) for peer in peers]
    assert not torch.equal(momenta[0], momenta[1])
    assert len({tuple(peer.buffer.tolist()) for peer in peers}) == 3


def test_a_global_average_is_the_mean_of_all_and_can_be_taken_back() -> None:
    peers = run(config_of(5, "ring"), 5, 6)
    own = [flat([*peer.params, peer.buffer]) for peer in peers]
    mean = torch.stack(own).double().mean(0).float()
    distances = at_once([as_gossip(peer).global_average for peer in peers])
    for peer, before, distance in zip(peers, own, distances, strict=True):
        torch.testing.assert_close(flat([*peer.params, peer.buffer]), mean, **CLOSE)
        assert distance == pytest.approx(float((before - mean)[:-3].norm()), rel=1e-5)
        assert as_gossip(peer).metrics() == {"d2c": distance}
        as_gossip(peer).revert_global_average()
        assert torch.equal(flat([*peer.params, peer.buffer]), before)
    assert min(filter(None, distances)) > 0.01


def test_an_average_that_is_taken_back_leaves_no_trace() -> None:
    straight = run(config_of(4, "one-peer-exp"), 4, 8)
    peers = run(config_of(4, "one-peer-exp"), 4, 5)
    at_once([as_gossip(peer).global_average for peer in peers])
    for peer in peers:
        as_gossip(peer).revert_global_average()
    at_once([lambda peer=peer: peer.run(3, 2) for peer in peers])
    for peer, other in zip(peers, straight, strict=True):
        assert torch.equal(torch.stack(peer.history), torch.stack(other.history))


def test_from_an_average_that_stays_all_go_on_and_drop_what_they_were_mixing() -> None:
    peers = run(config_of(4, "ring"), 4, 3)
    before = torch.stack([flat(peer.params) for peer in peers])
    at_once([lambda peer=peer: as_gossip(peer).global_average(revert=False) for peer in peers])
    momenta = [flat([peer.optimizer.state[p]["momentum_buffer"] for p in peer.params]) for peer in peers]
    at_once([lambda peer=peer: peer.step(2) for peer in peers])
    mean = [part.view(shape) for part, shape in zip(torch.split(before.double().mean(0).float(), [
        p.numel() for p in peers[0].params]), SHAPES, strict=True)]
    for peer, momentum in zip(peers, momenta, strict=True):
        expected = flat(mean) - 0.1 * (0.9 * momentum + flat(gradients(mean, peer.number, 3)))
        torch.testing.assert_close(flat(peer.params), expected, **CLOSE)
    at_once([lambda peer=peer: peer.step(2) for peer in peers])  # and mixing goes on
    assert all(peer.strategy.epoch == 5 for peer in peers)


def test_a_global_average_that_fails_changes_nothing() -> None:
    config = config_of(3, "ring")
    swarm = fixed_world(config, [2] * 3, 1)
    swarm.failing.add(("global average", 3))
    peers = run(config, 3, 4, swarm)
    own = [flat([*peer.params, peer.buffer]) for peer in peers]
    assert at_once([as_gossip(peer).global_average for peer in peers]) == [None] * 3
    assert all(torch.equal(flat([*peer.params, peer.buffer]), before) for peer, before in zip(peers, own, strict=True))
    assert as_gossip(peers[0]).metrics() == {}
    at_once([lambda peer=peer: peer.step(2) for peer in peers])


def test_alone_the_global_average_is_the_own_model() -> None:
    [peer] = run(config_of(1, "ring"), 1, 3)
    before = flat(peer.params)
    assert as_gossip(peer).global_average() == 0.0
    assert torch.equal(flat(peer.params), before)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_run_that_is_resumed_goes_on_exactly(topology: str) -> None:
    config = config_of(4, topology)
    straight, first = run(config, 4, 7), run(config, 4, 4)
    swarm = fixed_world(config, [2] * 4, 1)
    second = [Peer(config, InMachines(swarm.join(name), machines_of(4)), number, seed=9)
              for number, name in enumerate(names(4))]
    for peer, before in zip(second, first, strict=True):
        peer.go_on_from(before)
        peer.strategy.resume(4)
    at_once([lambda peer=peer: peer.run(3, 2) for peer in second])
    for peer, other in zip(straight, second, strict=True):
        assert torch.equal(torch.stack(peer.history[4:]), torch.stack(other.history))


def test_a_newcomer_takes_a_peers_parameters_and_mixes_from_then_on() -> None:
    config = config_of(2, "complete", max_allowed_epoch_difference=1)
    swarm = fixed_world(config, [2] * 2, 1)
    peers = [Peer(config, swarm.join(name), number) for number, name in enumerate(names(2))]
    at_once([lambda peer=peer: peer.run(3, 2) for peer in peers])
    swarm.quota = {"000": 2, "001": 2, "002": 2}
    newcomer = Peer(config, swarm.join("002"), 2, seed=4)
    newcomer.step(2)
    assert newcomer.strategy.epoch == 3
    assert any(torch.equal(flat(newcomer.params), flat(peer.params)) for peer in peers)
    for _ in range(2):
        at_once([lambda peer=peer: peer.step(2) for peer in (*peers, newcomer)])
    at_once([peer.strategy.settle for peer in (*peers, newcomer)])
    assert torch.equal(flat(newcomer.params), flat(peers[0].params))


def test_a_step_before_the_average_is_taken_back_is_a_bug() -> None:
    [peer] = run(config_of(1, "ring"), 1, 2)
    as_gossip(peer).global_average()
    with pytest.raises(AssertionError, match="revert_global_average"):
        peer.step(2)


def test_disagreement_stays_bounded_where_alone_it_grows() -> None:
    """Each peer is drawn to another place; mixing holds them together, the better the denser the topology."""
    def spread(peers: list[Peer]) -> float:
        values = torch.stack([flat(peer.params) for peer in peers])
        return float((values - values.mean(0)).norm() / sqrt(len(peers)))

    swarm = fixed_world(config_of(5, "ring"), [2] * 5, 1)
    swarm.failing |= {("parameters", epoch) for epoch in range(20)}
    apart = spread(run(config_of(5, "ring"), 5, 20, swarm))
    ring, complete = (spread(run(config_of(5, topology), 5, 20)) for topology in ("ring", "complete"))
    assert complete < ring < apart / 2
