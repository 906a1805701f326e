"""A stranger before the doors of a real swarm: whatever it sends, its members' weights are to the bit what they were.

Three members hold tokens of the run; the stranger has an identity of its own and none, or none that is good.
"""

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any

import psutil
import pytest
import torch
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PHandlerError
from hivemind.proto import dht_pb2
from hivemind.proto.auth_pb2 import AccessToken
from hivemind.utils import MSGPackSerializer, get_dht_time
from hivemind.utils.auth import AuthRole, AuthRPCWrapper, TokenAuthorizerBase
from intruder import MESSAGE, OTHER_AUTHORITY, STATE, Intruder, Presenting, addresses, logged, member, token
from processes import until
from swarm_peers import RUN, Peer, acquainted, enter, meet, swarm, together
from torch import Tensor

from averaging import messages
from averaging.holders import Holders
from averaging.messages import (
    Ask,
    Average,
    Call,
    Coming,
    Complete,
    Decide,
    Elsewhere,
    Late,
    Layout,
    Propose,
    Refuse,
    RoundId,
    Tell,
)
from averaging.progress import read_records
from averaging.round import name_group
from averaging.transports.swarm import frames
from averaging.transports.swarm.all_reduce import STREAMS, Result
from averaging.transports.swarm.averager import STREAMS_OF_ONE, Averager
from averaging.transports.swarm.frames import ALIVE, DATA, STOP, Header
from averaging.transports.swarm.session import Session
from averaging.transports.swarm.state import download
from averaging.transports.swarm.wire import LONGEST_MESSAGE, Refused
from proto.round_pb2 import Envelope

VALUES, EPOCHS = 1000, 2
PATIENT = {"request_timeout": 5.0, "matchmaking_time": 20.0, "averaging_timeout": 40.0, "next_chunk_timeout": 2.0}
MIB = 1 << 20


class Town:
    """The members, the stranger, and what the members were overheard to say."""

    def __init__(self, members: list[Peer], stranger: Intruder, folder: Path) -> None:
        self.members, self.stranger, self._folder = members, stranger, folder
        self.credentials = {
            "no token": b"", "token of another peer": token(members[0].key),
            "token expired": token(stranger.key, hours=-0.01),
            "token forged, or of another run": token(stranger.key, authority=OTHER_AUTHORITY),
            "malformed token": b"\xff" * 100, "oversize token": b"x" * 4097}

    @property
    def log(self) -> str:
        """Of the members."""
        return (self._folder / "log").read_text()

    def overheard(self, kind: str, epoch: int) -> list[tuple[str, str, bytes]]:
        """Sender, receiver and message, of one round."""
        lines = [line.split() for line in (self._folder / "overheard").read_text().splitlines()]
        said = [(sender, receiver, bytes.fromhex(data)) for sender, receiver, data in lines]
        return [one for one in said if (of := Envelope.FromString(one[2])).kind == kind and of.epoch == epoch]

    def group_id(self, kind: str, epoch: int) -> bytes:
        """Of the group that averages; waited for."""
        found: list[bytes] = []
        until(lambda: found.extend(
            said.propose.group_id for _, _, data in self.overheard(kind, epoch)
            if (said := Envelope.FromString(data)).WhichOneof("message") == "propose") or found, "a group averages", 20)
        return found[-1]

    def let_go(self, kind: str, epoch: int) -> None:
        """The average of a held round may begin."""
        (self._folder / f"{kind}-{epoch}").touch()


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    folder = tmp_path_factory.mktemp("town")
    with logged(folder / "log"), swarm(folder) as join, pytest.MonkeyPatch.context() as patch:
        tap(patch, folder)  # the members' forks inherit it
        members = [join(authoriser=member, **PATIENT) for _ in range(3)]
        acquainted(members)
        stranger = Intruder(folder / "stranger.key", addresses(members))
        yield Town(members, stranger, folder)
        stranger.close()


def tap(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Write down what averagers say; and where a round's kind is "held...", let it average when told to."""
    send, all_reduce = Averager.send, Averager.all_reduce

    def overheard_send(self: Averager, session: Session, receiver: str, message: messages.Message) -> None:
        with (folder / "overheard").open("a") as file:
            file.write(f"{self._setup.peer_id} {receiver} {self._wire.dump(message).hex()}\n")
        send(self, session, receiver, message)

    async def held_all_reduce(self: Averager, session: Session, group: Average) -> Result:
        round = session.meet.round
        while round.kind.startswith("held") and not (folder / f"{round.kind}-{round.epoch}").exists():
            await asyncio.sleep(0.01)
        return await all_reduce(self, session, group)

    patch.setattr(frames, "HEADER_SECONDS", 2.0)
    patch.setattr(Averager, "send", overheard_send)
    patch.setattr(Averager, "all_reduce", held_all_reduce)


Attack = Callable[[RoundId], None]


def train(town: Town, kind: str, *, gathering: Attack | None = None, averaging: Attack | None = None
          ) -> tuple[Tensor, Counter[str]]:
    """The weights that some steps lead to, the same in each call, and what was refused meanwhile.

    `gathering` is called while a group waits for its last member, `averaging` before it exchanges values (name the
    kind "held...").
    """
    weights, refused = [torch.zeros(VALUES) for _ in town.members], Counter[str]()
    for epoch in range(EPOCHS):
        grads, round = [gradient(each, number, epoch) for number, each in enumerate(weights)], RoundId(kind, epoch)
        expected = sum(grad.double() * share for grad, share in zip(grads, (0.25, 0.5, 0.25), strict=True))
        enter(town.members, epoch)
        meetings = []
        for number, peer in enumerate(town.members):
            if number == 2 and gathering:
                peer.swarm._board.expected, peer.swarm._board.step_seconds = monotonic() + 10, 10.0
                gathering(round)
            meetings.append(meet(peer, [grads[number]], town.members, weight=[100, 200, 100][number], kind=kind,
                                 epoch=epoch))
        if averaging:
            averaging(round)
            town.let_go(kind, epoch)
        for outcome in together(meetings):
            assert outcome.members == tuple(sorted(peer.id for peer in town.members)), outcome
            refused += Counter(outcome.refused)
        torch.testing.assert_close(grads[0].double(), expected, rtol=0, atol=1e-6)
        weights = [each - 0.5 * grad for each, grad in zip(weights, grads, strict=True)]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
    return weights[0], refused


def gradient(weights: Tensor, peer: int, epoch: int) -> Tensor:
    return torch.tanh(weights - torch.randn(VALUES, generator=torch.Generator().manual_seed(10 * epoch + peer)))


@pytest.fixture(scope="module")
def quiet(town: Town) -> Tensor:
    """The weights where nobody disturbs."""
    weights, refused = train(town, "quiet")
    assert not refused
    return weights


def all_there_is_to_say(town: Town, round: RoundId, shown: bytes, group_id: bytes) -> list[bytes]:
    """All that a member could say, said by the stranger with a good signature of its own."""
    wire, others = town.stranger.wire(shown), tuple(peer.id for peer in town.members)
    me = wire.member(round, weight=1e9, mode="node", fingerprint=b"", layout=Layout(VALUES))
    said = [
        messages.Join(round, 0, me), Call(round, 0, town.stranger.id), Coming(round, 0, 1e9), Late(round, 0, others),
        Elsewhere(round, 0, town.stranger.id),
        Propose(round, 0, name_group(round, 0, 1, town.stranger.id, (me,)), 1, (me,)),
        Refuse(round, 0, group_id, "because"), Complete(round, 0, group_id, False, others),
        Decide(round, 0, group_id, False, others, False), Decide(round, 0, group_id, True, (), True),
        Ask(round, 0, group_id), Tell(round, 0, group_id, "aborted", others),
        Tell(round, 0, group_id, "committed", ())]
    return [wire.dump(message) for message in said]


@pytest.mark.parametrize("stage", ["gathering", "averaging"])
def test_nothing_that_it_says_is_heard(town: Town, quiet: Tensor, stage: str) -> None:
    kind, sent = f"held messages {stage}".replace(" ", "-"), Counter[str]()

    def attack(round: RoundId) -> None:
        group_id = town.group_id(kind, round.epoch) if stage == "averaging" else bytes(16)
        for reason, shown in town.credentials.items():
            for data in all_there_is_to_say(town, round, shown, group_id):
                for peer in town.members:
                    assert town.stranger.call(peer, data) == f"Refused({reason!r})"
                    sent[reason] += 1
        if stage == "gathering":
            town.let_go(kind, round.epoch)

    weights, refused = train(town, kind, **{stage: attack})
    assert torch.equal(weights, quiet)
    assert refused == sent


def test_it_can_put_no_values_into_an_average(town: Town, quiet: Tensor) -> None:
    """It knows the group's secret name, and speaks as a member would."""
    sent = Counter[str]()

    def attack(round: RoundId) -> None:
        group_id = town.group_id("held-streams", round.epoch)
        values = torch.full((VALUES,), 1e30).numpy().tobytes()
        for reason, shown in town.credentials.items():
            for peer in town.members:
                for sent_frames in (DATA + values, STOP + bytes(2), ALIVE * 100):
                    assert town.stranger.stream(peer, STREAMS, bytes(Header(group_id, shown)) + sent_frames) == b""
                    sent[reason] += 1

    weights, refused = train(town, "held-streams", averaging=attack)
    assert torch.equal(weights, quiet)
    assert refused == sent


def test_what_it_has_recorded_it_can_not_play_back(town: Town, quiet: Tensor) -> None:
    """Members' own words, tokens and signatures, of this round and of one that is over."""
    played = Counter[str]()

    def replay(round: RoundId) -> None:
        for _, _, data in [*town.overheard("quiet", 0), *town.overheard(round.kind, round.epoch)]:
            for peer in town.members:
                assert town.stranger.call(peer, data) == "Refused('token of another peer')"
                played["token of another peer"] += 1

    def replay_in_the_midst(round: RoundId) -> None:
        town.group_id(round.kind, round.epoch)
        replay(round)

    assert len(town.overheard("quiet", 0)) > 4
    weights, refused = train(town, "held-replay", gathering=replay, averaging=replay_in_the_midst)
    assert torch.equal(weights, quiet)
    assert refused == played


def test_it_gets_no_state(town: Town, quiet: Tensor) -> None:
    loot, asked = memoryview(bytearray(MIB)), Counter[str]()
    for peer in town.members:
        peer.swarm.offer_state(lambda: {"weights": torch.ones(1000)})

    def attack(round: RoundId) -> None:
        for reason, shown in town.credentials.items():
            for peer in town.members:
                with pytest.raises(Refused, match=f"refused: {reason}"):
                    town.stranger.do(download(town.stranger.p2p, STATE, peer.id, loot, authoriser=Presenting(shown),
                                              epoch=0, patience=10))
                asked[reason] += 1

    weights, refused = train(town, "download", gathering=attack)
    assert torch.equal(weights, quiet)
    assert refused == asked
    assert not any(loot)


def test_what_is_too_long_is_not_taken(town: Town, quiet: Tensor) -> None:
    """By a byte, or up to what libp2p's daemon carries."""
    def attack(round: RoundId) -> None:
        for peer in town.members:
            for size in (LONGEST_MESSAGE + 1, 4 * MIB - 200):
                assert town.stranger.call(peer, bytes(size)) == "Refused('oversize message')"
            assert "exceeds set limit" in town.stranger.call(peer, bytes(4 * MIB))
            for length in (4097, 65535):
                header = bytes(16) + length.to_bytes(2)
                assert town.stranger.stream(peer, STREAMS, header + bytes(MIB)) == b""
            for length in (1 << 14 | 1, (1 << 32) - 1):
                assert town.stranger.stream(peer, STATE, length.to_bytes(4) + bytes(MIB)) == b""

    weights, refused = train(town, "oversize", gathering=attack)
    assert torch.equal(weights, quiet)
    each = 2 * 3 * EPOCHS
    assert refused == {"oversize message": each, "oversize token": each, "oversize header": each}


def test_garbage_breaks_nothing(town: Town, quiet: Tensor) -> None:
    """On every name that members listen to, as a message and as a stream."""
    names = (MESSAGE, STREAMS, STATE, "DHTProtocol.rpc_ping", "DHTProtocol.rpc_store", "DHTProtocol.rpc_find",
             "Holders.rpc_news", "else")
    draw = torch.Generator().manual_seed(5)

    def attack(round: RoundId) -> None:
        for name in names:
            for size in (1, 17, 300, 70_000):
                garbage = torch.randint(256, (size,), dtype=torch.uint8, generator=draw).numpy().tobytes()
                for peer in town.members:
                    assert town.stranger.call(peer, garbage, name) != ""
                    assert town.stranger.stream(peer, name, garbage, close=True) == b""
                    if name == STATE:
                        assert town.stranger.stream(peer, name, len(garbage).to_bytes(4) + garbage) == b""

    weights, refused = train(town, "garbage", gathering=attack)
    assert torch.equal(weights, quiet)
    assert {"malformed message", "oversize token", "oversize header", "malformed header"} <= refused.keys()
    assert all(len(reason) < 40 and not any(map(str.isdigit, reason)) for reason in refused)
    assert all(peer.swarm.is_alive and peer.dht.is_serving for peer in town.members)
    assert "malformed header" in town.log
    assert "Traceback" not in town.log


class Pretender(TokenAuthorizerBase):  # type: ignore[misc]  # hivemind is untyped
    """Signs with its own key, whosever token it shows, and takes any answer."""

    def __init__(self, stranger: Intruder, token: bytes) -> None:
        super().__init__(stranger.key)
        self.shown = AccessToken.FromString(token)

    async def get_token(self) -> AccessToken:
        return self.shown

    def is_token_valid(self, access_token: AccessToken) -> bool:
        return True

    def does_token_need_refreshing(self, access_token: AccessToken) -> bool:
        return False

    async def validate_response(self, response: object, request: object) -> bool:
        return True


async def ask(town: Town, peer: str, authorizer: TokenAuthorizerBase | None, call: str, request: Any) -> str:
    """What a node of the DHT answers to the stranger."""
    servicer = Holders if call == "rpc_news" else DHTProtocol
    stub = super(servicer, servicer).get_stub(town.stranger.p2p, PeerID.from_base58(peer))
    if authorizer:
        stub = AuthRPCWrapper(stub, AuthRole.CLIENT, authorizer, None)
    try:
        return str(await getattr(stub, call)(type(request).FromString(request.SerializeToString())))
    except P2PHandlerError as error:
        return f"refused: {error!r}"


def test_it_neither_reads_nor_writes_the_records(town: Town, quiet: Tensor) -> None:
    board, loot = (DHTID.generate(key).to_bytes() for key in (f"{RUN}_peers", "loot"))
    store = dht_pb2.StoreRequest(keys=[loot], subkeys=[b""], values=[MSGPackSerializer.dumps("mine")],
                                 expiration_time=[get_dht_time() + 600], in_cache=[False])
    tokens = [shown for reason, shown in town.credentials.items() if "malformed" not in reason and "size" not in reason]

    def attack(round: RoundId) -> None:
        for authorizer in [None, *(Pretender(town.stranger, shown) for shown in tokens)]:
            for peer in town.members:
                for call, request in (("rpc_find", dht_pb2.FindRequest(keys=[board])), ("rpc_store", store),
                                      ("rpc_news", dht_pb2.FindRequest(keys=[board]))):
                    assert town.stranger.do(ask(town, peer.id, authorizer, call, request)).startswith("refused")

    weights, _ = train(town, "records", gathering=attack)
    assert torch.equal(weights, quiet)
    for peer in town.members:
        assert peer.dht.get("loot", latest=True) is None
        assert {record.peer_id for record in read_records(peer.dht, RUN)} == {each.id for each in town.members}


def test_a_member_from_outside_changes_no_group(town: Town, quiet: Tensor) -> None:
    """It has a good token, and heard all that was said: it may speak, and nobody heeds it."""
    good, streams = token(town.stranger.key), list[Future[bytes]]()
    values = torch.full((VALUES,), 1e30).numpy().tobytes()

    def attack(round: RoundId) -> None:
        group_id = town.group_id("held-fellow", round.epoch)
        said = all_there_is_to_say(town, round, good, group_id)
        played = [data for _, _, data in town.overheard("held-fellow", round.epoch)]
        for peer in town.members:
            assert {town.stranger.call(peer, data) for data in said} == {""}
            assert {town.stranger.call(peer, with_token(data, good)) for data in played} == {
                "", "Refused('statement of another peer')"}
            streams.append(town.stranger.start(town.stranger.converse(
                peer.id, STREAMS, bytes(Header(group_id, good)) + DATA + values)))

    weights, refused = train(town, "held-fellow", averaging=attack)
    assert torch.equal(weights, quiet)
    assert [stream.result(10) for stream in streams] == [b""] * 3 * EPOCHS
    assert refused["statement of another peer"] == 3 * sum(
        Envelope.FromString(data).WhichOneof("message") == "join"
        for epoch in range(EPOCHS) for _, _, data in town.overheard("held-fellow", epoch))
    assert refused.keys() <= {"statement of another peer", "stranger"}
    assert not any(Envelope.FromString(data).attempt for epoch in range(EPOCHS)  # no group was made twice
                   for _, _, data in town.overheard("held-fellow", epoch))


def with_token(data: bytes, token: bytes) -> bytes:
    said = Envelope.FromString(data)
    said.token = token
    return bytes(said.SerializeToString())


def test_a_member_can_not_speak_in_anothers_name(town: Town, quiet: Tensor) -> None:
    """Records: under its own key, and under the other's."""
    victim = town.members[0].bulletin.record
    board, forged = DHTID.generate(f"{RUN}_peers").to_bytes(), asdict(replace(victim, epoch=10**6, name="impostor"))
    forged["addresses"] = list(forged["addresses"])
    own, others = RSASignatureValidator(town.stranger.key), RSASignatureValidator(town.members[0].key)
    stored = []

    def attack(round: RoundId) -> None:
        for subkey, signer in ((own.local_public_key, own), (others.local_public_key, own)):
            expires = get_dht_time() + 600
            key, value = MSGPackSerializer.dumps(subkey), MSGPackSerializer.dumps(forged)
            signed = signer.sign_value(DHTRecord(board, key, value, expires))
            request = dht_pb2.StoreRequest(keys=[board], subkeys=[key], values=[signed], expiration_time=[expires],
                                           in_cache=[False])
            for peer in town.members:
                stored.append(town.stranger.do(ask(
                    town, peer.id, Pretender(town.stranger, token(town.stranger.key)), "rpc_store", request)))
        for peer in town.members:
            peer.bulletin.hasten()

    weights, _ = train(town, "names", gathering=attack)
    assert torch.equal(weights, quiet)
    assert not any(answer.startswith("refused") for answer in stored)
    for peer in town.members:
        assert {record.peer_id: record.name for record in read_records(peer.dht, RUN)} == {
            each.id: each.bulletin.record.name for each in town.members}
        assert peer.swarm.standing().epoch < 10**6


def test_a_flood_stops_no_round_and_fills_no_memory(town: Town, quiet: Tensor) -> None:
    """A thousand messages and as many streams at a time, most of which say nothing and stay."""
    processes = [psutil.Process(peer.swarm.averager_pid) for peer in town.members]
    daemons = [peer.dht._p2pd for peer in town.members if peer.dht.is_serving]
    memory = [process.memory_info().rss for process in (*processes, *daemons)]
    files = sum(process.num_fds() for process in processes)
    ids, garbage = [peer.id for peer in town.members], os.urandom(2000)

    async def flood() -> None:
        await asyncio.gather(
            *(town.stranger.tell(ids[number % 3], garbage) for number in range(1000)),
            *(town.stranger.converse(ids[number % 3], STREAMS, garbage * (number % 4 == 0)) for number in range(800)),
            *(town.stranger.converse(ids[number % 3], STATE, b"") for number in range(200)))

    under_way = asyncio.run_coroutine_threadsafe(flood(), town.stranger.loop)
    longest, most_files, refused = 0.0, files, Counter[str]()
    for turn in count():
        is_last, started = under_way.done(), monotonic()
        weights, refused_now = train(town, f"flood-{turn}")
        longest, refused = max(longest, monotonic() - started), refused + refused_now
        assert torch.equal(weights, quiet)
        most_files = max(most_files, sum(process.num_fds() for process in processes))
        if is_last:
            break
    grown = max(process.memory_info().rss - before for process, before in zip(
        (*processes, *daemons), memory, strict=True))
    print(f"\n1000 messages and 1000 streams at a time: {EPOCHS * turn} rounds meanwhile, {EPOCHS} of them in "
          f"{longest:.2f} s at most, {most_files - files} files more at most, {grown / MIB:.0f} MiB; {dict(refused)}")
    assert under_way.exception() is None
    assert turn > 2
    assert longest < EPOCHS * PATIENT["request_timeout"]
    assert refused["malformed message"] == 1000
    assert refused["too many streams"] > 700
    assert most_files - files < 3 * 2 * STREAMS_OF_ONE
    assert grown < 64 * MIB
    until(lambda: sum(process.num_fds() for process in processes) <= files, "the streams are closed", 10)
