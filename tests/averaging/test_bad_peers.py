"""Members that spoil what they bring: what the others make of it, and what one hostile gradient of eight does."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from time import monotonic
from typing import Any

import pytest
import torch
from intruder import logged
from memory_peers import at_once
from safetensors.torch import save
from swarm_peers import FAST, Join, Peer, acquainted, enter, meet, swarm, together
from test_swarm_transport import ahead, state_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from averaging.config import Averaging
from averaging.messages import NOTHING, Average, Layout, Member, Propose, RoundId
from averaging.round import Group, Round, name_group
from averaging.strategies.open import open_strategy
from averaging.transports.memory import MemorySwarm
from averaging.transports.swarm.all_reduce import AllReduce, Result
from averaging.transports.swarm.averager import Averager, _Raw
from averaging.transports.swarm.frames import ALIVE, DATA, MOST_ALIVE, Stream
from averaging.transports.swarm.session import Session
from averaging.transports.swarm.state import REPLY
from averaging.transports.swarm.wire import MOST_VALUES, Wire
from proto.round_pb2 import StateReply
from training.data.config import Synthetic
from training.data.synthetic import generate
from training.data.views import normalise
from training.optimizers.build import initialise_state

PEERS, BAD, BATCH, STEPS, SIDE = 8, 3, 16, 120, 24
VALUES = 1000
Village = tuple[Join, list[Peer]]


# -- one hostile gradient of eight --


@pytest.fixture(scope="module")
def images() -> dict[str, tuple[Tensor, Tensor]]:
    """Four classes, two shapes with two textures each: pixels and labels of both splits."""
    config = Synthetic(num_train=1024, num_val=512, num_shapes=2, num_textures=2)
    drawn = {split: generate(config, SIDE, split) for split in ("train", "val")}
    return {split: (normalise(pixels), labels) for split, (pixels, labels) in drawn.items()}


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1),
            nn.ReLU(), nn.Flatten(), nn.Linear(64 * 9, 4))


def batches(images: tuple[Tensor, Tensor], peer: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A peer's own."""
    draw = torch.Generator().manual_seed(peer)
    for _ in range(steps):
        chosen = torch.randint(len(images[1]), (BATCH,), generator=draw)
        yield images[0][chosen], images[1][chosen]


def backward(net: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    loss = cross_entropy(net(pixels), labels)
    loss.backward()
    return loss.item()


@torch.inference_mode()
def accuracy(net: nn.Module, images: tuple[Tensor, Tensor]) -> float:
    return (net(images[0]).argmax(1) == images[1]).float().mean().item()


def learn(images: dict[str, tuple[Tensor, Tensor]], robust: str, factor: float) -> float:
    """Eight peers train; one of them sends `factor` times its gradients: what the others know in the end."""
    config = Averaging(target_batch_size=PEERS * BATCH, target_group_size=PEERS, robust=robust)
    memory = MemorySwarm(PEERS * BATCH, quota=BATCH, clip_radius=config.clip_radius if robust != "mean" else None)
    nets = [network() for _ in range(PEERS)]
    transports = [memory.join(f"{peer}") for peer in range(PEERS)]

    def train(peer: int) -> None:
        optimizer = torch.optim.Adam(nets[peer].parameters(), lr=3e-3)
        initialise_state(optimizer)
        stepper = open_strategy(config, transport=transports[peer], optimizer=optimizer)
        for pixels, labels in batches(images["train"], peer, STEPS):
            backward(nets[peer], pixels, labels)
            if peer == BAD:
                torch._foreach_mul_([p.grad for p in nets[peer].parameters()], factor)
            stepper.step(BATCH)
        assert stepper.epoch == STEPS

    at_once([lambda peer=peer: train(peer) for peer in range(PEERS)])
    assert all(torch.equal(ours, first) for net in nets[1:]
               for ours, first in zip(net.parameters(), nets[0].parameters(), strict=True))
    return accuracy(nets[0], images["val"])


def test_one_of_eight_that_sends_minus_ten_times_its_gradients(images: dict[str, tuple[Tensor, Tensor]],
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    """...stops the task from being learned by the plain mean, and hardly disturbs the robust one."""
    found = {(robust, factor): learn(images, robust, factor)
             for robust, factor in [("mean", 1.0), ("mean", -10.0), ("centered_clip", -10.0)]}
    with capsys.disabled():
        print("\n  four classes, eight peers: " + ", ".join(
            f"{robust} {'with one that sends -10 x' if factor < 0 else 'of honest ones'} {share:.1%}"
            for (robust, factor), share in found.items()))
    assert found["mean", 1.0] > 0.65
    assert found["mean", -10.0] < 0.35
    assert found["centered_clip", -10.0] > 0.6


def test_over_the_wire_too(images: dict[str, tuple[Tensor, Tensor]], tmp_path_factory: pytest.TempPathFactory,
                           capsys: pytest.CaptureFixture[str]) -> None:
    """Of four peers, the averager of one multiplies what its trainer hands it.

    Nobody is to be left behind: deadlines are longer than a busy machine keeps a process waiting.
    """
    patient = {"robust": "centered_clip", "request_timeout": 10.0, "next_chunk_timeout": 10.0,
               "matchmaking_time": 10.0, "averaging_timeout": 30.0}
    make, net, rounds = Averager._make_all_reduce, network(), 60

    def hostile_make(self: Averager, session: Session, group: Average) -> AllReduce:
        assert session.given is not None
        session.given.mul_(-10)
        return make(self, session, group)

    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    with swarm(tmp_path_factory.mktemp("robust")) as join:
        peers = [join(**patient) for _ in range(3)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Averager, "_make_all_reduce", hostile_make)
            peers.append(join(**patient))
        acquainted(peers)
        for epoch, given in enumerate(zip(*(batches(images["train"], peer, rounds) for peer in range(4)), strict=True)):
            enter(peers, epoch)
            grads = [list(torch.autograd.grad(cross_entropy(net(pixels), labels), list(net.parameters())))
                     for pixels, labels in given]
            outcomes = together([meet(peer, grad, peers, epoch=epoch, weight=BATCH)
                                 for peer, grad in zip(peers, grads, strict=True)])
            assert [len(outcome.members) for outcome in outcomes] == [4] * 4, (epoch, outcomes)
            for param, *same in zip(net.parameters(), *grads, strict=True):
                assert all(torch.equal(grad, same[0]) for grad in same)
                param.grad = same[0]
            optimizer.step()
    found = accuracy(net, images["val"])
    with capsys.disabled():
        print(f"\n  four classes, four peers of a real swarm, centered_clip with one that sends -10 x: {found:.1%} "
              f"after {rounds} rounds")
    assert found > 0.42


# -- what else a member can spoil --


@pytest.fixture(scope="module")
def village(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Village]:
    """Two honest peers; others may join them."""
    folder = tmp_path_factory.mktemp("village")
    with logged(folder / "log") as log, swarm(folder) as join:
        honest = [join(), join()]
        acquainted(honest)
        yield join, honest
        assert "Traceback" not in log.read_text()


def whole(peer: int) -> Tensor:
    """Numbers whose sums, and quarters of them, are exact."""
    return torch.randint(-1000, 1000, (VALUES,), generator=torch.Generator().manual_seed(peer)).float()


def test_a_weight_of_1e9_counts_as_the_target_batch_size(village: Village) -> None:
    join, honest = village
    peers = [*honest, join(client_mode=True, target_batch_size=10**12)]  # which believes in it
    acquainted(peers)
    values = [whole(number) for number in range(3)]
    outcomes = together([meet(peer, [values[number]], peers, weight=[500, 500, 1e9][number], kind="heavy")
                         for number, peer in enumerate(peers)])
    assert [len(outcome.members) for outcome in outcomes] == [3, 3, 3]
    expected = (whole(0) + whole(1) + 2 * whole(2)) / 4  # FAST's target is 1000
    assert torch.equal(values[0], expected)
    assert torch.equal(values[1], expected)


def nan(payload: bytes | memoryview) -> bytes:
    return torch.full((len(payload) // 4,), float("nan")).numpy().tobytes()


SPOILT: dict[str, Callable[[Any], list[tuple[bytes, Any]]]] = {  # frames in the place of one, by why they are refused
    "oversize": lambda payload: [(DATA, bytes(payload)), (DATA, b"")],
    "misshapen": lambda payload: [(b"\x07", payload)],
    "non-finite": lambda payload: [(DATA, nan(payload))],
    "flood": lambda payload: [*[(ALIVE, b"")] * (MOST_ALIVE + 1), (DATA, payload)]}


@pytest.fixture(scope="module")
def spoiler(village: Village) -> Peer:
    """Spoils its frames, as a round's kind says."""
    send, all_reduce, kinds = Stream.send, Averager.all_reduce, list[str]()

    async def hostile_all_reduce(self: Averager, session: Session, group: Average) -> Result:
        kinds.append(session.meet.round.kind)
        return await all_reduce(self, session, group)

    def hostile_send(self: Stream, kind: bytes, payload: Any = b"") -> None:
        for frame in SPOILT[kinds[-1]](payload) if kind == DATA else [(kind, payload)]:
            send(self, *frame)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "send", hostile_send)
        patch.setattr(Averager, "all_reduce", hostile_all_reduce)
        spoiler = village[0](client_mode=True)
    acquainted([*village[1], spoiler])
    return spoiler


@pytest.mark.parametrize("reason", SPOILT)
def test_spoilt_frames_leave_the_mean_of_the_others(village: Village, spoiler: Peer, reason: str) -> None:
    honest = village[1]
    peers = [*honest, spoiler]
    enter(peers, 0)
    values, started = [whole(number) for number in range(3)], monotonic()
    outcomes = together([meet(peer, [values[number]], peers, kind=reason) for number, peer in enumerate(peers)])
    took = monotonic() - started
    assert [outcome.members for outcome in outcomes[:2]] == [tuple(sorted(peer.id for peer in honest))] * 2
    assert not outcomes[2].averaged
    assert (Counter(outcomes[0].refused) + Counter(outcomes[1].refused))[reason] == 1
    assert torch.equal(values[0], (whole(0) + whole(1)) / 2)
    assert torch.equal(values[1], values[0])
    assert torch.equal(values[2], whole(2))
    assert took < 2 * FAST["request_timeout"] + 2 * FAST["next_chunk_timeout"]


def test_garbage_in_answer_to_messages_spoils_no_mean(village: Village) -> None:
    """It counts as no answer, so who sends it is left out, or leaves one out; what is averaged is whole."""
    join, honest = village
    take_call = Averager._take_call

    async def hostile_take_call(self: Averager, call: _Raw, context: object) -> _Raw:
        await take_call(self, call, context)
        return _Raw(b"\xff" * 10)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Averager, "_take_call", hostile_take_call)
        peers = [*honest, join()]
    acquainted(peers)
    averaged = 0
    for epoch in range(6):  # it leads in some
        enter(peers, epoch)
        values = [whole(number) for number in range(3)]
        outcomes = together([meet(peer, [values[number]], peers, kind="answers", epoch=epoch)
                             for number, peer in enumerate(peers)])
        for number, outcome in enumerate(outcomes[:2]):
            members = outcome.members if outcome.averaged else (honest[number].id,)
            mean = torch.stack([whole(each) for each, peer in enumerate(peers) if peer.id in members]).mean(0)
            torch.testing.assert_close(values[number], mean, rtol=0, atol=1e-3)
            averaged += outcome.averaged
        assert max(outcome.seconds for outcome in outcomes[:2]) < 2 * FAST["request_timeout"]
    assert averaged >= 6


@pytest.fixture(scope="module")
def helper(village: Village) -> Peer:
    return village[0](auxiliary=True)


@pytest.mark.parametrize("said", ["more values than there is memory for", "nothing"])
def test_a_helper_outlives_a_leader_that_lies_about_what_there_is(village: Village, helper: Peer, said: str) -> None:
    member, propose = Wire.member, Round._propose
    layout = NOTHING if said == "nothing" else Layout(tensors=MOST_VALUES)

    def hostile_member(self: Wire, round: RoundId, **options: Any) -> Member:
        return member(self, round, **options | {"layout": layout})

    def hostile_propose(self: Round) -> None:
        members = tuple(self._joined[peer] for peer in sorted(self._joined))
        if len(members) < 2:
            propose(self)
            return
        self._serial += 1
        group_id = name_group(self.round, self.attempt, self._serial, self._me.peer_id, members)
        self._begin(Group(group_id, self._serial, self._me.peer_id, members))
        for peer in self._others:
            self._say(peer, Propose, group_id=group_id, serial=self._serial, members=members)

    async def hostile_all_reduce(self: Averager, session: Session, group: Average) -> Result:
        return Result(True, (), 0, 0, Counter())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Wire, "member", hostile_member)
        patch.setattr(Averager, "all_reduce", hostile_all_reduce)
        patch.setattr(Round, "_propose", hostile_propose)
        hostile = village[0](auxiliary=said == "nothing")
    acquainted([helper, hostile])
    for epoch in range(4):  # it leads in some
        enter([helper, hostile], epoch)
        meet(hostile, [] if said == "nothing" else [torch.ones(1)], [helper, hostile], kind=said, epoch=epoch)
        outcome = meet(helper, [], [helper, hostile], kind=said, epoch=epoch).result()
        assert not outcome.averaged
        assert outcome.reason


def sound_reply(state: bytes) -> bytes:
    """What a donor sends with `state`, whatever that is, where all may join."""
    reply = StateReply(epoch=6, length=len(state), sha256=sha256(state).digest()).SerializeToString()
    return REPLY + len(reply).to_bytes(4) + reply + state


def of_a_dtype_that_torch_does_not_know() -> bytes:
    """Safetensors knows it, so it is a good file."""
    header = b'{"weight":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}'
    return len(header).to_bytes(8, "little") + header + bytes(4)


def test_donors_that_answer_with_garbage_are_passed_over(village: Village, caplog: pytest.LogCaptureFixture) -> None:
    join, (asker, donor) = village
    garbage = [REPLY + (10).to_bytes(4) + b"\xff" * 10, REPLY + b"\xff" * 4, b"\x07" * 10, b"",
               sound_reply(b"no safetensors"), sound_reply(of_a_dtype_that_torch_does_not_know()),
               sound_reply(save(state_of(1) | {"weight": torch.zeros(3)})), sound_reply(save({}))]
    answers = iter(garbage)

    async def hostile_give(self: Averager, peer: str, reader: asyncio.StreamReader,
                           writer: asyncio.StreamWriter) -> None:
        writer.write(next(answers))
        await reader.read()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Averager, "_give_state", hostile_give)
        hostile = join()
    for peer in (asker, donor, hostile):
        peer.swarm.offer_state(lambda: state_of(1))
    enter([asker], 0)
    ahead(donor, asker, epoch=5)
    ahead(hostile, asker, epoch=6)
    for _ in garbage:
        found = asker.swarm.fetch_state()
        assert found is not None
        assert found[0] == 5
    assert caplog.text.count("is no state of this experiment") == 4  # those that came in good order
