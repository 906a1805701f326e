"""What all strategies share."""

from collections.abc import Mapping, Sequence
from threading import Event, Thread
from typing import Any

import pytest
import torch
from memory_peers import Peer, assert_close, assert_equal, backward, batches, network, plain_sgd
from torch import Tensor

from averaging.config import Averaging
from averaging.strategies import strategy
from averaging.strategies.open import CLASSES, open_strategy
from averaging.strategies.strategy import Gathered
from averaging.transports.memory import MemorySwarm
from averaging.transports.transport import Outcome, Standing
from training.loop import LocalStepper

CONFIG = {"target_batch_size": 8, "target_group_size": 4}


class Elsewhere:
    """A transport whose swarm is where the test says, and that takes note of what it is told."""

    peer_id = "me"

    def __init__(self) -> None:
        self.now = Standing(epoch=0, samples=0, peers=2)
        self.reports: list[tuple[int, int, bytes]] = []
        self.state: tuple[int, dict[str, Tensor]] | None = None
        self.due, self.fetches, self.averages = False, 0, True
        self.others: tuple[str, ...] = ("you",)

    def report(self, epoch: int, samples: int, fingerprint: bytes = b"") -> None:
        self.reports.append((epoch, samples, fingerprint))

    def standing(self) -> Standing:
        return self.now

    def is_due(self, epoch: int) -> bool:
        return self.due

    def members(self, epoch: int) -> tuple[str, ...]:
        return ("me", *self.others)

    def meet(self, tensors: Sequence[Tensor], weight: float, **options: Any) -> "Elsewhere":
        assert all(tensor.isfinite().all() for tensor in tensors) or not weight
        return self

    def done(self) -> bool:
        return True

    def result(self) -> Outcome:
        return Outcome(self.averages, ("me", *self.others) if self.averages else ())

    def cancel(self) -> None:
        pass

    def offer_state(self, read: Any) -> None:
        self.read = read

    def fetch_state(self) -> tuple[int, Mapping[str, Tensor]] | None:
        self.fetches += 1
        return self.state

    def close(self) -> None:
        pass


class Away(Peer):
    """A peer on `Elsewhere`."""

    def __init__(self, net_seed: int = 1, **options: object) -> None:
        self.elsewhere, self.net, self.ends, self.loads = Elsewhere(), network(net_seed), [], []
        self.stepper = open_strategy(
            Averaging(**{**CONFIG, **options}), transport=self.elsewhere, optimizer=plain_sgd(self.net),
            shared_buffers=self.net.buffers(), on_round=self.ends.append, on_state_load=self.loads.append)

    def epoch_ends(self) -> None:
        self.elsewhere.due = True
        self.train(batches(0, (4,)))
        self.elsewhere.due = False


@pytest.mark.parametrize("name", CLASSES)
def test_every_strategy_of_the_config_opens_and_steps(name: str) -> None:
    assert set(CLASSES) == set(Averaging.model_fields["strategy"].annotation.__args__)
    swarm = MemorySwarm(8)
    peer = Peer(swarm, "a", Averaging(strategy=name, **CONFIG))
    assert type(peer.stepper).__name__ == CLASSES[name]
    before = [p.clone() for p in peer.parameters]
    assert [(p.epoch, p.updated) for p in peer.train(batches(0, [4] * 4))] == [
        (0, False), (1, True), (1, False), (2, True)]
    assert not torch.equal(before[0], peer.parameters[0])
    peer.stepper.close()
    assert not swarm.peers


def test_gathering_is_that_of_a_lone_stepper() -> None:
    nets = network(), network()
    stepper = LocalStepper(torch.optim.SGD(nets[0].parameters(), lr=1.0), target_batch_size=100)
    params = list(nets[1].parameters())
    gathered = Gathered(params)
    for batch in batches(0, (3, 5, 2)):
        backward(nets[0], batch)
        stepper.step(len(batch))
        backward(nets[1], batch)
        assert gathered.add(len(batch))
    assert gathered.samples == 10
    assert_equal(gathered.take(), stepper._mean)
    assert gathered.samples == 0
    assert not any(grad.any() for grad in gathered.take()), "what was taken is not there any more"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_gradient_leaves_what_was_gathered_untouched(bad: float) -> None:
    params = [torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)]
    gathered = Gathered(params)
    params[0].grad = torch.ones(2)
    assert gathered.add(2)
    params[0].grad, params[1].grad = torch.ones(2), torch.tensor([bad])
    assert not gathered.add(2)
    assert all(param.grad is None for param in params)
    assert gathered.samples == 2
    assert_equal(gathered.take(), [torch.ones(2), torch.zeros(1)])


def test_it_tells_its_progress_and_the_sketch_that_the_epoch_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    sketches = []

    def counted(tensors: Sequence[Tensor]) -> bytes:
        sketches.append(bytes([len(sketches)]))
        return sketches[-1]

    monkeypatch.setattr(strategy, "sketch", counted)
    peer = Away()
    peer.train(batches(0, (4, 2)))
    peer.epoch_ends()
    peer.train(batches(0, (3,)))
    assert peer.elsewhere.reports == [(0, 0, b"\0"), (0, 4, b"\0"), (0, 6, b"\0"), (0, 10, b"\0"), (1, 0, b"\1"),
                                      (1, 3, b"\1")]
    assert len(sketches) == 2, "once per epoch"


def test_who_averages_with_others_may_be_one_epoch_behind_a_group_but_not_two() -> None:
    peer = Away()
    peer.epoch_ends()
    peer.elsewhere.now = Standing(epoch=2, samples=0, peers=2)
    peer.train(batches(0, (4,)))
    assert peer.elsewhere.fetches == 0
    peer.elsewhere.now = Standing(epoch=3, samples=0, peers=2)
    peer.train(batches(0, (4,)))
    assert peer.elsewhere.fetches == 1


@pytest.mark.parametrize("left_out", ["new", "failed", "alone"])
def test_who_is_left_out_of_rounds_downloads_as_soon_as_the_swarm_is_ahead(left_out: str) -> None:
    peer = Away()
    if left_out != "new":
        peer.epoch_ends()
        peer.elsewhere.averages = left_out != "failed"
        peer.elsewhere.others = () if left_out == "alone" else ("you",)
        peer.epoch_ends()
        assert peer.ends[-1].outcome == left_out
    peer.elsewhere.now = Standing(epoch=peer.stepper.epoch + 1, samples=0, peers=2)
    peer.train(batches(0, (4,)))
    assert peer.elsewhere.fetches == 1


def test_an_archive_that_is_ahead_of_all_who_train_is_caught_up_with() -> None:
    peer = Away()
    peer.elsewhere.now = Standing(epoch=0, samples=0, peers=1, archived=1)
    peer.train(batches(0, (4,)))
    assert peer.elsewhere.fetches == 1


def test_an_archive_that_is_not_ahead_changes_nothing() -> None:
    peer = Away()
    peer.epoch_ends()
    peer.elsewhere.now = Standing(epoch=peer.stepper.epoch, samples=0, peers=1, archived=peer.stepper.epoch)
    peer.train(batches(0, (4,)))
    assert peer.elsewhere.fetches == 0


def test_the_allowed_difference_is_configurable() -> None:
    peer = Away(max_allowed_epoch_difference=3)
    peer.epoch_ends()
    peer.elsewhere.now = Standing(epoch=4, samples=0, peers=2)
    peer.train(batches(0, (4,)))
    assert peer.elsewhere.fetches == 0
    peer.elsewhere.now = Standing(epoch=5, samples=0, peers=2)
    peer.train(batches(0, (4,)))
    assert peer.elsewhere.fetches == 1


def test_a_download_that_nobody_answers_is_tried_again_and_gradients_are_dropped() -> None:
    peer = Away()
    before = [p.clone() for p in peer.parameters]
    peer.elsewhere.now = Standing(epoch=5, samples=0, peers=2)
    progress = peer.train(batches(0, (4, 4)))
    assert [p.samples_accumulated for p in progress] == [0, 0]
    assert [(load.succeeded, load.epoch) for load in peer.loads] == [(False, 0)] * 2
    assert_equal(peer.parameters, before)


def whole_state(epoch: int) -> dict[str, Tensor]:
    """Of a peer that has trained elsewhere."""
    peer = Away(net_seed=7)
    peer.train(batches(3, (4, 4)))
    peer.epoch_ends()
    return peer.elsewhere.read() | {"epoch": torch.tensor(epoch)}


def test_a_downloaded_state_is_taken_over_whole() -> None:
    peer, state = Away(), whole_state(5)
    peer.elsewhere.now, peer.elsewhere.state = Standing(epoch=5, samples=0, peers=2), (5, state)
    peer.train(batches(0, (4,)))
    assert peer.stepper.epoch == 5
    assert [(load.succeeded, load.epoch) for load in peer.loads] == [(True, 5)]
    ours = peer.elsewhere.read()
    assert ours.keys() == state.keys()
    assert_equal(ours.values(), [state[name] for name in ours])
    assert peer.elsewhere.reports[-1][:2] == (5, 0)
    assert {name.split(".")[0] for name in state} == {"parameters", "buffers", "statistics", "strategy", "epoch"}


@pytest.mark.parametrize("fault", ["a tensor too few", "a tensor too many", "a shape", "a dtype", "a NaN", "old"])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(fault: str) -> None:
    peer, state = Away(), whole_state(5)
    peer.stepper.resume(3)
    match fault:
        case "a tensor too few":
            del state["parameters.0"]
        case "a tensor too many":
            state["more"] = torch.zeros(1)
        case "a shape":
            state["parameters.1"] = torch.zeros(11)
        case "a dtype":
            state["parameters.1"] = state["parameters.1"].double()
        case "a NaN":
            state["statistics.0.momentum_buffer"].view(-1)[0] = float("nan")
        case "old":
            state["epoch"] = torch.tensor(2)
    before = peer.elsewhere.read()
    peer.elsewhere.now, peer.elsewhere.state = Standing(epoch=5, samples=0, peers=2), (5, state)
    peer.train(batches(0, (4,)))
    assert [load.succeeded for load in peer.loads] == [False]
    after = peer.elsewhere.read()
    assert peer.stepper.epoch == 3
    names = [name for name in before if not name.startswith("buffers")]  # the forward pass changed those
    assert_equal([after[name] for name in names], [before[name] for name in names])


def test_what_others_download_is_never_of_two_epochs() -> None:
    peer = Peer(MemorySwarm(4), "a", Averaging(target_batch_size=4, target_group_size=2))
    peer.stepper.resume(0)
    read, done, taken = peer.stepper.read_state, Event(), list[dict[str, Tensor]]()

    def keep_reading() -> None:
        while not done.is_set():
            taken.append(read())

    thread = Thread(target=keep_reading)
    thread.start()
    states = {0: read()}
    for batch in batches(0, [4] * 60):
        peer.train([batch])
        states[peer.stepper.epoch] = read()
    done.set()
    thread.join()
    assert len({int(state["epoch"]) for state in taken}) > 5
    for state in taken:
        expected = states[int(state["epoch"])]
        for name, value in state.items():
            if not name.startswith("buffers"):
                assert torch.equal(value, expected[name]), name


def test_what_is_read_does_not_change_with_training() -> None:
    peer = Away()
    peer.train(batches(0, (4,)))
    state = peer.elsewhere.read()
    copies = {name: value.clone() for name, value in state.items()}
    peer.epoch_ends()
    assert_equal(state.values(), copies.values())
    assert not torch.equal(peer.elsewhere.read()["parameters.0"], state["parameters.0"])


def test_the_strategys_own_tensors_go_into_a_checkpoint_and_come_back() -> None:
    peer = Away()
    state = {name: value.clone() + 1 for name, value in peer.stepper.extra_state().items()}
    peer.stepper.load_extra_state(state)
    assert_equal(peer.stepper.extra_state().values(), state.values())
    with pytest.raises(ValueError, match="others"):
        peer.stepper.load_extra_state(state | {"more": torch.zeros(1)})


def test_the_optimisers_step_counters_are_downloaded_but_not_averaged() -> None:
    params = [torch.zeros(3, requires_grad=True), torch.zeros((), requires_grad=True)]  # a counter's shape too
    stepper = open_strategy(Averaging(**CONFIG), transport=Elsewhere(), optimizer=torch.optim.AdamW(params))
    assert [value.shape for value in stepper.statistics()] == [(3,), (3,), (), ()]
    assert sum(name.endswith(".step") for name in stepper.read_state()) == 2


def test_a_round_in_the_records_carries_what_the_transport_says_of_it() -> None:
    class Detailed(Elsewhere):
        def result(self) -> Outcome:
            return Outcome(averaged=False, reason="a stone fell", seconds=3.0, matchmaking_seconds=1.0, bytes_sent=7,
                           bytes_received=8, refused={"stranger": 2})

    peer = Away()
    peer.elsewhere.meet = lambda *_, **__: Detailed()  # type: ignore[method-assign]
    peer.epoch_ends()
    end = peer.ends[0]
    assert (end.kind, end.outcome, end.epoch, end.group_size) == ("gradients", "failed", 0, 1)
    assert (end.reason, end.seconds, end.matchmaking_seconds) == ("a stone fell", 3.0, 1.0)
    assert (end.bytes_sent, end.bytes_received, end.refused) == (7, 8, {"stranger": 2})


def test_parameters_move_only_when_the_epoch_ends() -> None:
    peer = Away()
    before = [p.clone() for p in peer.parameters]
    peer.train(batches(0, (4, 4, 4)))
    assert_equal(peer.parameters, before)
    peer.epoch_ends()
    with pytest.raises(AssertionError):
        assert_close(peer.parameters, before)
