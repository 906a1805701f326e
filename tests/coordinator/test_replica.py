"""Coordinators of one run over real gRPC and TLS: what they hand to each other, and to nobody else."""

import asyncio
import logging
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from drawn_facts import FACTS
from grpc import StatusCode
from hypothesis import given

import coordinator.in_step
from averaging.experiment import Experiment, canonical, experiment_of, run_id
from averaging.identity import open_key, public_bytes, sign
from averaging.membership import enrolment_words, exchange_words
from averaging.version import VERSION
from coordinator.authority import Authority, Denied
from coordinator.calls import TOKEN
from coordinator.credits import Credit
from coordinator.facts import CoordinatorFact, Facts, by_key
from coordinator.in_step import InStep
from coordinator.link import Link
from coordinator.replica import CALLS, LATELY_SECONDS, MOST, Own, ReplicaService, heard_lately, others
from coordinator.service import bind_grpc
from coordinator.standby import ask, checked, kept_experiment, take_over
from coordinator.tls import Certificate, connect, self_signed
from coordinator.wire import decode, digest, encode
from proto.coordinator_pb2 import EnrolRequest
from proto.replica_pb2 import CoordinatorFact as CoordinatorMessage
from proto.replica_pb2 import ExchangeReply, ExchangeRequest, ExchangeWords, HandoverReply
from proto.replica_pb2_grpc import ReplicaStub, add_ReplicaServicer_to_server
from training.errors import BadInput

EXPERIMENT: Experiment = experiment_of({"name": "tiny", "optimizer": {"lr": 0.1, "max_epochs": 10},
                                        "averaging": {"target_batch_size": 256, "target_group_size": 2}})
RUN = run_id(EXPERIMENT)
CERTIFICATES = self_signed(), self_signed()
THE_TOKEN = "the-operators-token"


@dataclass(frozen=True)
class Coordinator:
    """One that runs, less its DHT node and what it shows."""

    authority: Authority
    own: Own
    folder: Path


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The authority's, as its file has it."""
    path = tmp_path_factory.mktemp("authority") / "key"
    open_key(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def volunteers(tmp_path_factory: pytest.TempPathFactory) -> list[RSAPrivateKey]:
    folder = tmp_path_factory.mktemp("volunteers")
    return [open_key(folder / str(number)) for number in range(2)]


@pytest.fixture
def folders(tmp_path: Path, key: bytes) -> list[Path]:
    """Of the first, which has all, and of a second, which has its key."""
    made = [tmp_path / name for name in ("first", "second")]
    for folder in made:
        folder.mkdir()
        (folder / "authority.key").write_bytes(key)
    return made


@asynccontextmanager
async def running(folder: Path, certificate: Certificate, name: str, port: int = 0) -> AsyncIterator[Coordinator]:
    with closing(Authority(folder, RUN, is_open=False)) as authority:
        server, port = bind_grpc("127.0.0.1", port, certificate)
        own = Own(name, Link("127.0.0.1", port, RUN, certificate.fingerprint), [f"/ip4/127.0.0.1/tcp/1/p2p/{name}"])
        add_ReplicaServicer_to_server(ReplicaService(
            authority, own, document=canonical(EXPERIMENT), folder=folder, token=THE_TOKEN, version=VERSION,
            initial_peers=lambda: own.addresses), server)
        await server.start()
        try:
            yield Coordinator(authority, own, folder)
        finally:
            await server.stop(None)


Story = Callable[..., Awaitable[None]]


def with_one(folders: list[Path], story: Story) -> None:
    async def told() -> None:
        async with running(folders[0], CERTIFICATES[0], "QmFirst") as first:
            await story(first)
    asyncio.run(told())


def with_two(folders: list[Path], story: Story) -> None:
    """Two that have heard of each other, as a standby introduces itself."""
    async def told() -> None:
        async with AsyncExitStack() as stack:
            first, second = [await stack.enter_async_context(running(folder, certificate, name))
                             for folder, certificate, name in zip(folders, CERTIFICATES, ("QmFirst", "QmSecond"),
                                                                  strict=True)]
            second.authority.ledger.learn(Facts(coordinators=by_key([first.own.fact(time.time())])))
            await story(first, second)
    asyncio.run(told())


def enrol(one: Coordinator, volunteer: RSAPrivateKey, name: str, invite: str) -> str:
    """The name it gets, or why it gets none."""
    request = EnrolRequest(run_id=RUN, name=name, version=VERSION, invite=invite, time=time.time(),
                           public_key=public_bytes(volunteer))
    request.signature = sign(volunteer, enrolment_words(request))
    try:
        return one.authority.enrol(request).name
    except Denied as denied:
        return denied.reason


async def step(one: Coordinator, times: int = 1) -> InStep:
    """Have it ask the others so often."""
    stop, in_step = asyncio.Event(), InStep(one.authority, one.own)
    turns = 0
    asked = in_step._try

    async def counted(other: CoordinatorFact) -> None:
        nonlocal turns
        await asked(other)
        turns += 1
        if turns >= times:
            stop.set()
    in_step._try = counted  # type: ignore[method-assign]
    await asyncio.wait_for(in_step.keep(stop), 30)
    return in_step


# -- handing over --

def test_who_has_the_admin_token_gets_all_that_a_coordinator_needs(
        folders: list[Path], volunteers: list[RSAPrivateKey], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(TOKEN, THE_TOKEN)
    folder = tmp_path / "new"
    folder.mkdir()

    async def story(first: Coordinator) -> None:
        for volunteer, name in zip(volunteers, ("ada", "eve"), strict=True):
            enrol(first, volunteer, name, first.authority.invite_to_show or "")
        first.authority.ban("eve", "spam")
        first.authority.credits.record([Credit(1, "QmAda", b"group", 64, 64, 1)], time.time())
        reply = await ask(first.own.link)
        assert checked(first.own.link, reply) == EXPERIMENT
        assert kept_experiment(folder) is None
        take_over(reply, folder, RUN)
        assert kept_experiment(folder) == EXPERIMENT
        secret = ("authority.key", "admin.token", "experiment.json", "ledger.sqlite", "credits.sqlite")
        assert {stat.S_IMODE((folder / name).stat().st_mode) for name in secret} == {0o600}
        assert (folder / "admin.token").read_text() == THE_TOKEN
        with closing(Authority(folder, RUN, is_open=False)) as second:
            assert second.public_key == first.authority.public_key
            assert second.ledger.facts() == first.authority.ledger.facts()
            assert second.credits.recent() == first.authority.credits.recent() != []
            assert second.credits.leaderboard({"QmAda": "ada"}).rows["QmAda"].samples == 64
            assert second.ban_file.newest().signed == first.authority.ban_file.newest().signed
    with_one(folders, story)
    assert "a copy of the authority's key and of the ledger was handed to 127.0.0.1" in caplog.text


def test_a_key_that_is_there_is_not_written_over(key: bytes, tmp_path: Path) -> None:
    (tmp_path / "authority.key").write_bytes(b"another's")
    with pytest.raises(BadInput, match="another authority"):
        take_over(HandoverReply(experiment=canonical(EXPERIMENT), authority_key=key), tmp_path, RUN)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"another's"]


@pytest.mark.parametrize(("token", "run", "found"), [
    ("", RUN, "no COVEY_ADMIN_TOKEN in the environment"), ("é", RUN, "no good COVEY_ADMIN_TOKEN"),
    ("guessed", RUN, "no good admin token"), (THE_TOKEN, "other-0123456789ab", "is not run here")])
def test_nobody_else_gets_anything(folders: list[Path], monkeypatch: pytest.MonkeyPatch, token: str, run: str,
                                   found: str) -> None:
    monkeypatch.setenv(TOKEN, token)

    async def story(first: Coordinator) -> None:
        with pytest.raises(BadInput, match=found) as refused:
            await ask(replace(first.own.link, run_id=run))
        assert "\n" not in str(refused.value)
        assert first.authority.failures["admin token"] == (token == "guessed")
    with_one(folders, story)


def test_what_is_handed_over_is_held_against_the_link(key: bytes) -> None:
    link = Link("127.0.0.1", 1, RUN, "A" * 43)
    good = HandoverReply(experiment=canonical(EXPERIMENT), authority_key=key)
    assert checked(link, good) == EXPERIMENT
    with pytest.raises(BadInput, match="as in the link"):
        checked(link, HandoverReply(experiment=good.experiment + b" ", authority_key=key))
    with pytest.raises(BadInput, match=r"a key from .* that is none"):
        checked(link, HandoverReply(experiment=good.experiment, authority_key=b"garbage"))


# -- keeping in step --

def test_two_that_ask_each_other_know_the_same(folders: list[Path], volunteers: list[RSAPrivateKey]) -> None:
    async def story(first: Coordinator, second: Coordinator) -> None:
        invite = first.authority.create_invite("for one", uses=1).code
        enrol(first, volunteers[0], "ada", invite)
        first.authority.ban("ada", "spam")
        assert first.authority.ledger.facts().coordinators == {}
        seen = await step(second)
        assert seen.heard == {first.own.link.address: pytest.approx(time.time(), abs=10)}
        assert enrol(second, volunteers[0], "ada", invite) == "banned"
        assert enrol(second, volunteers[1], "eve", invite) == "invite"  # the one use is gone, here too
        second.authority.ban("ada", "", lift=True)
        assert others(first.authority.ledger.facts(), first.own) == [second.own.fact(
            first.authority.ledger.facts().coordinators["QmSecond"].time)]  # it introduced itself
        await step(first)
        assert first.authority.ledger.facts() == second.authority.ledger.facts()
        assert first.authority.ban_file.newest().signed == second.authority.ban_file.newest().signed
        assert enrol(first, volunteers[0], "ada", "") == "ada"
    with_two(folders, story)


def test_an_invite_for_one_used_at_both_while_apart_is_good_nowhere_afterwards(
        folders: list[Path], volunteers: list[RSAPrivateKey], tmp_path: Path) -> None:
    third = open_key(tmp_path / "third")

    async def story(first: Coordinator, second: Coordinator) -> None:
        invite = first.authority.create_invite("for one", uses=1).code
        await step(second)
        assert enrol(first, volunteers[0], "ada", invite) == enrol(second, volunteers[1], "ada", invite) == "ada"
        await step(second)
        await step(first)
        for one in (first, second):
            assert sorted(member.name for member in one.authority.ledger.members()) == ["ada", "ada-2"]
            assert enrol(one, third, "bob", invite) == "invite"
    with_two(folders, story)


def test_who_knows_as_much_is_told_nothing(folders: list[Path]) -> None:
    async def story(first: Coordinator, second: Coordinator) -> None:
        await step(second)
        await step(first)
        reply = await call(first, request_of(second, first.own.link.certificate))
        assert not reply.HasField("facts")
        first.authority.create_invite("new")
        assert (await call(first, request_of(second, first.own.link.certificate))).HasField("facts")
    with_two(folders, story)


def test_one_that_is_away_is_asked_again_and_it_is_told_once(
        folders: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(coordinator.in_step, "ASK_SECONDS", 0.01)
    caplog.set_level(logging.INFO, "covey.coordinator")

    async def story(first: Coordinator) -> None:
        away = Own("QmAway", replace(first.own.link, port=1), [])
        first.authority.ledger.learn(Facts(coordinators=by_key([away.fact(time.time())])))
        assert (await step(first, 3)).heard == {away.link.address: 0.0}
    with_one(folders, story)
    assert caplog.text.count(": no coordinator answers at 127.0.0.1:1") == 1


async def call(callee: Coordinator, request: ExchangeRequest) -> ExchangeReply:
    async with await connect(callee.own.link, timeout_seconds=10) as channel:
        reply: ExchangeReply = await ReplicaStub(channel).Exchange(request, timeout=10)
        return reply


def request_of(caller: Coordinator, callee: str, *, now: float | None = None, run: str = RUN,
               signer: Callable[[bytes], bytes] | None = None) -> ExchangeRequest:
    """As a coordinator asks, but for what a test has otherwise."""
    words = ExchangeWords(run_id=run, callee=callee, time=time.time() if now is None else now,
                          caller=CoordinatorMessage(**vars(caller.own.fact(1.0))),
                          known=digest(encode(caller.authority.ledger.facts()))).SerializeToString()
    return ExchangeRequest(words=words, signature=(signer or caller.authority.sign)(exchange_words(words)))


def test_who_does_not_hold_the_authoritys_key_hears_nothing(
        folders: list[Path], volunteers: list[RSAPrivateKey]) -> None:
    async def story(first: Coordinator, second: Coordinator) -> None:
        there = first.own.link.certificate
        wrong = {
            "a stranger's": request_of(second, there, signer=lambda words: sign(volunteers[0], words)),
            "unsigned": request_of(second, there, signer=lambda _: b""),
            "signed as something else": request_of(
                second, there, signer=lambda words: second.authority.sign(words + b"x")),
            "for another, played back": request_of(second, second.own.link.certificate),
            "another run's": request_of(second, there, run="other-0123456789ab"),
            "empty": ExchangeRequest(), "garbage": ExchangeRequest(words=b"\xff" * 50, signature=b"\xff" * 50)}
        for what, request in wrong.items():
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(first, request)
            assert refused.value.code() is StatusCode.UNAUTHENTICATED, what
        assert first.authority.failures == {"replica": len(wrong)}
        for now in (time.time() - 100, time.time() + 100, float("nan")):
            with pytest.raises(grpc.aio.AioRpcError, match="Set both machines' clocks"):
                await call(first, request_of(second, there, now=now))
        assert first.authority.ledger.facts().coordinators == {}
    with_two(folders, story)


def test_one_address_does_not_call_without_end(folders: list[Path]) -> None:
    async def story(first: Coordinator) -> None:
        codes = set()
        async with await connect(first.own.link, timeout_seconds=10) as channel:
            for _ in range(CALLS[1] + 10):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await ReplicaStub(channel).Exchange(ExchangeRequest(), timeout=10)
                codes.add(refused.value.code())
        assert codes == {StatusCode.UNAUTHENTICATED, StatusCode.RESOURCE_EXHAUSTED}
    with_one(folders, story)


# -- who is asked, and told to others --

def where(peer_id: str, port: int, time: float) -> CoordinatorFact:
    return Own(peer_id, Link("host", port, RUN, "A" * 43), ["/a", "/b"]).fact(time)


def test_of_coordinators_at_one_address_only_the_newest_is_one() -> None:
    own = Own("QmOwn", Link("host", 1, RUN, "A" * 43), [])
    found = others(Facts(coordinators=by_key([
        where("QmOwn", 1, 9.0), where("QmOldOwn", 1, 5.0), where("QmA", 2, 3.0), where("QmAnew", 2, 4.0),
        where("QmB", 3, 1.0), CoordinatorFact("QmLater", 8.0, "later://x", "")])), own)
    assert [fact.peer_id for fact in found] == ["QmAnew", "QmB"]
    many = others(Facts(coordinators=by_key(where(f"Qm{port}", port, port) for port in range(2, 30))), own)
    assert [fact.peer_id for fact in many] == [f"Qm{port}" for port in range(29, 30 - MOST, -1)]


def test_one_that_was_not_heard_of_for_a_week_is_named_to_nobody() -> None:
    old, new = where("QmA", 1, 0.0), where("QmB", 2, 10.0)
    assert heard_lately([old, new], LATELY_SECONDS - 1) == [old, new]
    assert heard_lately([old, new], LATELY_SECONDS) == [new]


@given(FACTS)
def test_what_is_written_down_is_read_again(known: Facts) -> None:
    assert decode(encode(known)) == known
    assert digest(encode(known)) == digest(encode(decode(encode(known))))


def test_any_change_changes_the_digest() -> None:
    known: list[Any] = [Facts(), Facts(serial=1), Facts(coordinators=by_key([where("QmA", 1, 1.0)])),
                        Facts(coordinators=by_key([where("QmA", 1, 2.0)]))]
    assert len({digest(encode(each)) for each in known}) == len(known)
