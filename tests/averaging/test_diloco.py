from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_peers import at_once
from threads_of_peers import Peer, fixed_world, flat, gradients, names, sgd, start, together
from torch import Tensor

from averaging.compression import roundtrip
from averaging.config import Averaging
from averaging.records import RoundEnd
from averaging.strategies.diloco import DiLoCo, dealt_out
from averaging.transports.memory import MemorySwarm
from training.errors import BadInput

SAMPLES = [2, 2, 2, 2]  # of a micro-batch, by peer
UNEVEN = [1, 3, 2, 2]  # then some make more steps than others
CLOSE = {"rtol": 2e-6, "atol": 2e-6}
NESTEROV = {"outer_lr": 0.7, "outer_momentum": 0.9, "outer_nesterov": True}


def config_of(peers: int, *, strategy: str = "diloco", local_steps: int = 3, **options: Any) -> Averaging:
    # threads run ahead of each other while nobody waits; here that is no reason to download a state
    return Averaging(strategy=strategy, target_batch_size=local_steps * sum(SAMPLES[:peers]), target_group_size=8,
                     local_steps=local_steps, max_allowed_epoch_difference=4, **options)


def run(config: Averaging, peers: int, epochs: int, swarm: MemorySwarm | None = None, *,
        samples: Sequence[int] = SAMPLES, **options: Any) -> list[Peer]:
    """All peers, at the end; each makes `local_steps` micro-batches in an epoch, and as many steps."""
    swarm = swarm or fixed_world(config, samples[:peers], config.local_steps)
    return together(swarm, [
        lambda transport, number=number: Peer(config, transport, number, **options).run(
            epochs * config.local_steps, samples[number])
        for number in range(peers)])


def simulate(config: Averaging, peers: int, epochs: int, failed: Collection[int] = ()) -> list[list[Tensor]]:
    """Parameters by peer and micro-batch: loops in one process, the outer optimiser torch's."""
    weights = torch.tensor(SAMPLES[:peers], dtype=torch.float64) / sum(SAMPLES[:peers])
    models = [start() for _ in range(peers)]
    inner = [sgd(model) for model in models]
    anchor = start()
    outer = [torch.optim.SGD([anchor[index] for index in part], lr=config.outer_lr, momentum=config.outer_momentum,
                             nesterov=config.outer_nesterov)
             for part in dealt_out([p.numel() for p in anchor], config.fragments)]
    history: list[list[Tensor]] = [[] for _ in range(peers)]
    on_its_way: dict[int, list[tuple[Tensor, Tensor]]] = {}  # fragment: anchors, and the gradients for them

    def land() -> None:
        for fragment, pairs in on_its_way.items():
            for param, delta in pairs:
                param.grad = delta
            outer[fragment].step()
            for model in models:
                for index, param in enumerate(anchor):
                    if any(param is each for each, _ in pairs):
                        model[index].copy_((1 - config.alpha) * model[index] + config.alpha * param)
        on_its_way.clear()

    with torch.no_grad():
        for step in range(epochs * config.local_steps):
            for peer, model in enumerate(models):
                for param, grad in zip(model, gradients(model, peer, step), strict=True):
                    param.grad = grad
                inner[peer].step()
            epoch, place = divmod(step + 1, config.local_steps)
            if place == config.delay and config.delay:
                land()
            if place == 0 and epoch - 1 not in failed:
                fragment = (epoch - 1) % config.fragments
                on_its_way[fragment] = [
                    (anchor[index], torch.stack([(anchor[index] - model[index]).double() * weight for weight, model in
                                                 zip(weights, models, strict=True)]).sum(0).float())
                    for index in dealt_out([p.numel() for p in anchor], config.fragments)[fragment]]
                if not config.delay:
                    land()
            for peer, model in enumerate(models):
                history[peer].append(flat(model))
    return history


def of_parameters(peer: Peer) -> Tensor:
    """[micro-batches, N], without the buffer."""
    return torch.stack(peer.history)[:, :-3]


def quota_of(swarm: MemorySwarm) -> Mapping[str, int]:
    assert isinstance(swarm.quota, Mapping)
    return swarm.quota


def as_diloco(peer: Peer) -> DiLoCo:
    assert isinstance(peer.strategy, DiLoCo)
    return peer.strategy


def anchors(peer: Peer) -> Tensor:
    state = peer.strategy.extra_state()
    return flat([state[f"anchor.{index}"] for index in range(len(peer.params))])


def outer_momentum(peer: Peer) -> Tensor:
    return flat(list(as_diloco(peer).shared_state().values()))


@pytest.mark.parametrize("peers", [2, 4])
@pytest.mark.parametrize("delay", [0, 2])
def test_outer_rate_one_without_momentum_is_local_sgd_to_the_bit(peers: int, delay: int) -> None:
    """BatchNorm's statistics and weights too. With a delay it is another rule: the test can tell."""
    plain = {"outer_lr": 1.0, "outer_momentum": 0.0, "outer_nesterov": False}
    ours = run(config_of(peers, delay=delay, **plain), peers, epochs=4, samples=UNEVEN)
    theirs = run(config_of(peers, strategy="local_sgd"), peers, epochs=4, samples=UNEVEN)
    for one, other in zip(ours, theirs, strict=True):
        same = torch.equal(torch.stack(one.history), torch.stack(other.history))
        assert same == (delay == 0)


@pytest.mark.parametrize(("peers", "options"), [
    (2, NESTEROV), (3, NESTEROV | {"outer_nesterov": False}), (3, NESTEROV | {"alpha": 0.5}),
    (2, NESTEROV | {"fragments": 2}), (4, NESTEROV | {"fragments": 4}), (2, NESTEROV | {"delay": 1}),
    (3, NESTEROV | {"delay": 2, "alpha": 0.5, "fragments": 2}), (4, NESTEROV | {"delay": 1, "alpha": 0.5}),
    (2, {"outer_lr": 0.3, "outer_momentum": 0.0, "outer_nesterov": False, "fragments": 6}),
])
def test_peers_do_what_loops_in_one_process_do(peers: int, options: dict[str, Any]) -> None:
    config = config_of(peers, **options)
    expected = simulate(config, peers, epochs=9)
    for peer, history in zip(run(config, peers, epochs=9), expected, strict=True):
        torch.testing.assert_close(of_parameters(peer), torch.stack(history), **CLOSE)


@pytest.mark.parametrize("options", [NESTEROV, NESTEROV | {"fragments": 2, "delay": 2}])
def test_after_a_failed_meeting_the_next_one_has_the_lost_delta_too(options: dict[str, Any]) -> None:
    config, ends = config_of(3, **options), list[RoundEnd]()
    swarm = fixed_world(config, SAMPLES[:3], config.local_steps)
    swarm.failing |= {("steps", 1), ("steps", 2)}
    expected = simulate(config, 3, epochs=7, failed={1, 2})
    for peer, history in zip(run(config, 3, 7, swarm, on_round=ends.append), expected, strict=True):
        torch.testing.assert_close(of_parameters(peer), torch.stack(history), **CLOSE)
    assert sum(end.outcome == "failed" for end in ends) == 2 * 3


def test_a_failed_meeting_leaves_anchor_momentum_and_parameters_untouched() -> None:
    config = config_of(2, **NESTEROV)
    swarm = fixed_world(config, SAMPLES[:2], config.local_steps)
    swarm.failing.add(("steps", 2))
    peers = together(swarm, [
        lambda transport, number=number: Peer(config, transport, number).run(8, SAMPLES[number])
        for number in range(2)])
    before = [(anchors(peer), outer_momentum(peer)) for peer in peers]
    local = [torch.stack(peer.history)[-1] for peer in peers]
    at_once([lambda peer=peer: peer.step(SAMPLES[peer.number]) for peer in peers])
    for peer, (anchor, momentum), own in zip(peers, before, local, strict=True):
        assert peer.strategy.epoch == 3
        assert torch.equal(anchors(peer), anchor)
        assert torch.equal(outer_momentum(peer), momentum)
        assert not torch.equal(flat(peer.params), own[:-3])  # the local step is still there
    assert not torch.equal(flat(peers[0].params), flat(peers[1].params))


@pytest.mark.parametrize("compression", ["none", "blockwise8bit"])
def test_whoever_missed_a_meeting_has_the_common_anchor_again_after_the_next(compression: str) -> None:
    config = config_of(3, **NESTEROV, compression=compression)
    swarm = fixed_world(config, SAMPLES[:3], config.local_steps)
    swarm.lost.add(("steps", 1, "001"))
    peers = run(config, 3, 2, swarm)
    assert torch.equal(anchors(peers[0]), anchors(peers[2]))
    assert not torch.equal(anchors(peers[0]), anchors(peers[1]))
    at_once([lambda peer=peer: peer.run(config.local_steps, SAMPLES[peer.number]) for peer in peers])
    for other in peers[1:]:
        assert torch.equal(anchors(peers[0]), anchors(other))
        assert torch.equal(outer_momentum(peers[0]), outer_momentum(other))
        assert torch.equal(flat(peers[0].params), flat(other.params))


def test_the_mean_of_all_is_kept_while_anchors_differ() -> None:
    """With outer_lr 1 the new anchor is the mean of all parameters, whoever's anchor was where."""
    config = config_of(2, outer_lr=1.0, outer_momentum=0.0, outer_nesterov=False, compression="fp16")
    swarm = fixed_world(config, SAMPLES[:2], config.local_steps)
    swarm.failing.add(("steps", 0))
    peers = run(config, 2, 1, swarm)
    for peer in peers:
        with torch.no_grad():
            for index in range(len(peer.params)):
                peer.strategy.extra_state()[f"anchor.{index}"].add_(peer.number)
    at_once([lambda peer=peer: peer.run(config.local_steps - 1, SAMPLES[peer.number]) for peer in peers])
    states = [[p.detach().clone().requires_grad_() for p in peer.params] for peer in peers]
    ends = at_once([lambda peer=peer: peer.run(1, SAMPLES[peer.number]) for peer in peers])
    last = []
    for peer, params in zip(ends, states, strict=True):  # the last local step, by hand
        momenta = [peer.optimizer.state[p]["momentum_buffer"] for p in peer.params]
        last.append(flat([param.detach() - 0.1 * momentum for param, momentum in zip(params, momenta, strict=True)]))
    mean = (last[0] * SAMPLES[0] + last[1] * SAMPLES[1]) / sum(SAMPLES[:2])
    for peer in ends:
        torch.testing.assert_close(anchors(peer), mean, rtol=1e-3, atol=2e-3)


class Recording:
    """A transport that keeps what was handed to `meet`."""

    def __init__(self, transport: Any, before_meeting: Callable[[], None] = lambda: None) -> None:
        self._transport, self.before_meeting = transport, before_meeting
        self.sent: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def meet(self, tensors: Sequence[Tensor], weight: float, *, kind: str, **options: Any) -> Any:
        if kind == "steps":
            self.sent.append(flat(tensors).clone())
            self.before_meeting()
        return self._transport.meet(tensors, weight, kind=kind, **options)


def of_two_sizes(config: Averaging, transport: Any, number: int, epochs: int) -> tuple[Tensor, Tensor]:
    """Deltas as they were and as they were sent [epochs, N]; every one has parts that 8 bits are too few for."""
    recording = Recording(transport)
    true = list[Tensor]()
    peer = Peer(config, recording, number)
    recording.before_meeting = lambda: true.append(anchors(peer) - flat(peer.params))
    speeds = [torch.full_like(p, 0.001 * (1 + index)) for index, p in enumerate(peer.params)]
    speeds[0][0, 0] = 1.0
    for _ in range(epochs * config.local_steps):
        for param, speed in zip(peer.params, speeds, strict=True):
            param.grad = speed.clone()
        peer.strategy.step(SAMPLES[number])
    return torch.stack(true), torch.stack(recording.sent)


def test_with_error_feedback_what_was_sent_is_all_that_was_done_but_for_one_quantum() -> None:
    config = config_of(2, outer_lr=0.7, outer_momentum=0.0, outer_nesterov=False, compression="blockwise8bit")
    swarm = fixed_world(config, SAMPLES[:2], config.local_steps)
    for true, sent in together(swarm, [
            lambda transport, number=number: of_two_sizes(config, transport, number, epochs=30)
            for number in range(2)]):
        quantum = sent.abs().max() / 127
        lacking = (true.sum(0) - sent.sum(0)).abs().max()
        assert 0 < lacking <= quantum
        without = torch.stack([roundtrip("blockwise8bit", delta, delta.numel()) for delta in true])
        assert (true.sum(0) - without.sum(0)).abs().max() > 3 * quantum


def test_eight_bits_of_the_steps_leave_buffers_as_they_are() -> None:
    config = config_of(2, **NESTEROV, compression="blockwise8bit")
    swarm = fixed_world(config, SAMPLES[:2], config.local_steps)
    peers = together(swarm, [lambda transport, number=number: Peer(config, Recording(transport), number).run(
        2 * config.local_steps, SAMPLES[number]) for number in range(2)])
    assert torch.equal(peers[0].buffer, peers[1].buffer)
    uncompressed = run(config_of(2, **NESTEROV), 2, 2)
    torch.testing.assert_close(peers[0].buffer, uncompressed[0].buffer)


@pytest.mark.parametrize("compression", ["fp16", "bf16", "blockwise8bit"])
def test_compressed_peers_stay_near_the_uncompressed_ones_and_equal(compression: str) -> None:
    exact = run(config_of(3, **NESTEROV), 3, epochs=5)
    peers = run(config_of(3, **NESTEROV, compression=compression), 3, epochs=5)
    assert all(torch.equal(flat(peers[0].params), flat(peer.params)) for peer in peers)
    assert 0 < (flat(exact[0].params) - flat(peers[0].params)).abs().max() < 0.05


def test_a_contribution_that_is_not_finite_counts_for_nothing_and_is_mended() -> None:
    config = config_of(3, **NESTEROV, compression="blockwise8bit")
    swarm, ends = fixed_world(config, SAMPLES[:3], config.local_steps), list[RoundEnd]()
    peers = run(config, 3, 1, swarm)
    peers[1].strategy._on_round = ends.append
    at_once([lambda peer=peer: peer.run(config.local_steps - 1, SAMPLES[peer.number]) for peer in peers])
    peers[1].optimizer.param_groups[0]["lr"] = torch.inf
    at_once([lambda peer=peer: peer.run(1, SAMPLES[peer.number]) for peer in peers])
    assert [end.refused for end in ends if end.kind == "steps"] == [{"non-finite": 1}]
    assert all(torch.equal(flat(peers[0].params), flat(peer.params)) for peer in peers)
    assert flat(peers[0].params).isfinite().all()
    assert all(value.isfinite().all() for peer in peers for value in peer.strategy.extra_state().values())


def test_alone_the_outer_step_is_made_with_the_own_delta() -> None:
    config = config_of(1, **NESTEROV, compression="blockwise8bit", delay=1, fragments=2)
    ends = list[RoundEnd]()
    [peer] = run(config, 1, epochs=6, on_round=ends.append)
    torch.testing.assert_close(of_parameters(peer), torch.stack(simulate(config, 1, epochs=6)[0]), **CLOSE)
    assert [end.outcome for end in ends] == ["alone"] * 6


def test_local_steps_go_on_while_a_fragment_is_under_way() -> None:
    config = config_of(2, **NESTEROV, delay=2)
    swarm = fixed_world(config, SAMPLES[:2], config.local_steps)
    one, other = (Peer(config, swarm.join(name), number) for number, name in enumerate(names(2)))
    one.run(config.local_steps, SAMPLES[0])
    before = flat(one.params)
    one.step(SAMPLES[0])  # would wait in vain for the other, who has not begun
    assert one.strategy.epoch == 1
    assert not torch.equal(flat(one.params), before)
    assert torch.equal(anchors(one), flat(start()))
    at_once([lambda: one.step(SAMPLES[0]), lambda: other.run(config.local_steps + 2, SAMPLES[1])])
    assert torch.equal(flat(one.params), flat(other.params))
    assert torch.equal(flat(one.params), anchors(one))


def test_settling_applies_what_is_under_way() -> None:
    config = config_of(2, **NESTEROV, delay=2)
    peers = run(config, 2, 1)
    assert not torch.equal(flat(peers[0].params), flat(peers[1].params))
    at_once([peer.strategy.settle for peer in peers])
    assert torch.equal(flat(peers[0].params), flat(peers[1].params))
    assert torch.equal(flat(peers[0].params), anchors(peers[0]))


def test_a_newcomer_gets_anchors_and_outer_momentum_and_starts_from_the_anchors() -> None:
    config = config_of(2, **NESTEROV, fragments=2)
    swarm = fixed_world(config, SAMPLES[:2], config.local_steps)
    peers = run(config, 2, 5, swarm)
    at_once([lambda peer=peer: peer.step(SAMPLES[peer.number]) for peer in peers])
    swarm.quota = {**quota_of(swarm), "new": 1000}
    newcomer = Peer(config, swarm.join("new"), 0, seed=5)
    newcomer.step()
    assert newcomer.strategy.epoch == 5
    assert torch.equal(anchors(newcomer), anchors(peers[0]))
    assert torch.equal(outer_momentum(newcomer), outer_momentum(peers[0]))
    assert torch.equal(flat(newcomer.params), anchors(peers[0]))
    assert not torch.equal(flat(peers[0].params), anchors(peers[0]))


@pytest.mark.parametrize("compression", ["none", "blockwise8bit"])
def test_a_run_that_is_resumed_goes_on_exactly(compression: str) -> None:
    config = config_of(2, **NESTEROV, fragments=2, compression=compression)
    straight, first = run(config, 2, 6), run(config, 2, 3)
    swarm = fixed_world(config, SAMPLES[:2], config.local_steps)
    second = [Peer(config, swarm.join(name), number, seed=9) for number, name in enumerate(names(2))]
    for peer, before in zip(second, first, strict=True):
        peer.go_on_from(before)
        peer.strategy.load_extra_state({name: value.clone() for name, value in before.strategy.extra_state().items()})
        peer.strategy.resume(3)
    at_once([lambda peer=peer: peer.run(3 * config.local_steps, SAMPLES[peer.number]) for peer in second])
    for peer, other in zip(straight, second, strict=True):
        assert torch.equal(flat([*peer.params, peer.buffer]), flat([*other.params, other.buffer]))


def test_parameters_that_were_loaded_before_the_start_are_the_first_anchors() -> None:
    config = config_of(1, **NESTEROV)
    peer = Peer(config, fixed_world(config, SAMPLES[:1], 3).join("000"), 0)
    with torch.no_grad():
        torch._foreach_add_(peer.params, 1.0)
    peer.strategy.resume(0)
    assert torch.equal(anchors(peer), flat(peer.params))


def test_peers_that_start_apart_are_made_equal() -> None:
    config = config_of(3, **NESTEROV)
    swarm = fixed_world(config, SAMPLES[:3], config.local_steps)

    def synchronised(transport: Any, number: int) -> Peer:
        peer = Peer(config, transport, number, seed=number)
        peer.strategy.synchronise()
        return peer

    for peer in together(swarm, [lambda transport, number=number: synchronised(transport, number)
                                 for number in range(3)]):
        assert torch.equal(flat(peer.params), flat(start(0)))
        assert torch.equal(anchors(peer), flat(start(0)))


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30), fragments=st.integers(1, 6))
def test_every_tensor_is_in_one_fragment_and_fragments_are_of_like_size(sizes: list[int], fragments: int) -> None:
    dealt = dealt_out(sizes, fragments)
    assert sorted(index for part in dealt for index in part) == list(range(len(sizes)))
    totals = [sum(sizes[index] for index in part) for part in dealt]
    assert max(totals) - min(totals) <= max(sizes)


def test_tensors_of_one_size_are_dealt_out_in_strides() -> None:
    assert dealt_out([7] * 8, 3) == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_more_fragments_than_tensors_are_refused_at_the_start() -> None:
    with pytest.raises(BadInput, match=r"averaging\.fragments = 7; expected at most 6"):
        Peer(config_of(1, fragments=7), MemorySwarm(3).join(names(1)[0]), 0)


def test_a_code_whose_errors_can_not_be_fed_back_is_refused() -> None:
    with pytest.raises(ValueError, match=r"averaging\.compression = blockwise8bit"):
        config_of(1, compression="uniform8bit")
